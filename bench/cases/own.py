"""Contenders and shapes of somebody's own, from a file: ``python -m bench --with FILE``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.cases.op import Baseline
from bench.cases.shapes import Convolution, Map

MODULE = "bench_own"  # what the file is imported as: Triton looks a kernel's source up by its module


class OwnError(ValueError):
    """A file that cannot be used; the message is one sentence for its author."""


@dataclass(frozen=True)
class Contender:
    """A function that is checked and timed beside ours.

    Attributes:
        name: as the rows have it.
        op: "batch_norm", or one set of kernels as "deform_conv2d (general)".
        function: takes the op's arguments by their names.
    """

    name: str
    op: str
    function: Callable[..., Tensor]

    @property
    def baseline(self) -> Baseline:
        """What the benchmark measures."""
        return Baseline(self.name, lambda device: self.function)


@dataclass(frozen=True)
class Own:
    """What a file adds."""

    contenders: tuple[Contender, ...] = ()
    shapes: tuple[Map | Convolution, ...] = ()


def read_own(path: Path) -> Own:
    """Run a file, and take its lists ``CONTENDERS`` and ``SHAPES``.

    Raises:
        OwnError: if it does not run, or has neither list, or something else is in them.
    """
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or not path.is_file():
        raise OwnError(f"{path}: expected a Python file")
    module = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is in it
        raise OwnError(f"{path}: does not run: {type(error).__name__}: {error}") from error
    contenders = _listed(path, module, "CONTENDERS", (Contender,))
    shapes = _listed(path, module, "SHAPES", (Map, Convolution))
    if not contenders and not shapes:
        raise OwnError(f"{path}: expected a list CONTENDERS, a list SHAPES, or both")
    return Own(contenders, shapes)


def _listed(path: Path, module: Any, name: str, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """A list of the file's; nothing without one."""
    found = getattr(module, name, [])
    if not isinstance(found, (list, tuple)):
        raise OwnError(f"{path}: {name}: expected a list, got {type(found).__name__}")
    for each in found:
        if not isinstance(each, kinds):
            words = " or ".join(kind.__name__ for kind in kinds)
            raise OwnError(f"{path}: {name}: expected each to be a {words}, got {each!r}")
    return tuple(found)
