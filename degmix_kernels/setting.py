"""Values that a block of code chooses for what runs inside it."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")


class Setting(Generic[Value]):
    """A value of the running thread or asyncio task, and of the backward passes that it starts.

    Blocks of several threads or tasks may overlap: none sees another's value. PyTorch runs the backward pass
    of a GPU on a thread of its own. That thread inherits objects stashed by name, and no context variables.

    Args:
        name: unique in the process.
        default: the value outside of all blocks; not None.
    """

    def __init__(self, name: str, default: Value) -> None:
        self.name, self.default = name, default
        self._variable: ContextVar[Value | None] = ContextVar(name, default=None)
        self._thread = _Thread(default)

    def get(self) -> Value:
        """The value here and now."""
        if torch.compiler.is_compiling():
            return self._thread.value
        value = self._variable.get()
        if value is not None:
            if self._thread.value != value:  # another task's block was entered or left since
                self._publish(value)
            return value
        if torch._C._is_key_in_tls(self.name):
            thread, value = torch._C._get_obj_in_tls(self.name)
            # This thread's own blocks are the context variable's business: they may be another task's.
            if thread != threading.get_ident():
                return value
        return self.default

    @contextmanager
    def set(self, value: Value) -> Iterator[None]:
        """Choose a value for the block inside."""
        thread = self._thread
        if thread.blocks == 0:
            known = torch._C._is_key_in_tls(self.name)
            thread.outside = torch._C._get_obj_in_tls(self.name) if known else None
        thread.blocks += 1
        token = self._variable.set(value)
        self._publish(value)
        try:
            yield
        finally:
            self._variable.reset(token)
            thread.blocks -= 1
            outer = self._variable.get()
            self._publish(self.default if outer is None else outer)
            if thread.blocks == 0 and thread.outside is not None:
                _stash(self.name, *thread.outside)

    def _publish(self, value: Value) -> None:
        """Say the value to compiled code and to the threads of backward passes."""
        self._thread.value = value
        _stash(self.name, threading.get_ident(), value)


def _stash(name: str, thread: int, value: object) -> None:
    """Have backward passes inherit who chose which value. PyTorch has a reference of its own on the pair."""
    pair = (thread, value)  # a new one, which no other thread counts references of meanwhile
    before = sys.getrefcount(pair)
    torch._C._stash_obj_in_tls(name, pair)
    if sys.getrefcount(pair) == before:  # PyTorch 2.11 forgets to count it, and gives it back all the same
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pair))


class _Thread(threading.local):
    """What a thread knows beside context variables, which older compilers cannot read: they guard attributes.

    Attributes:
        value: of the block that was entered, left or asked for last.
        blocks: how many are open, of all tasks.
        outside: what was stashed outside of all blocks.
    """

    def __init__(self, value: object) -> None:
        self.value, self.blocks = value, 0
        self.outside: tuple[int, object] | None = None
