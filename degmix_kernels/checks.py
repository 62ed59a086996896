"""Argument checks of every op, in one voice: argument, what was expected, what came.

A check runs before any launch and raises ``TypeError`` for a wrong type, dtype or device and ``ValueError``
for a wrong shape or value. Expectations are constant strings wherever sizes may vary, so that a check
that holds formats nothing and ``torch.compile`` does not fix a size because of a message.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def expect(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise ``ValueError`` naming the argument, what was expected and what came, unless true."""
    if not condition:
        got = tuple(got) if isinstance(got, torch.Size) else got
        raise ValueError(f"{argument}: expected {expected}, got {got}")


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expect_tensor(argument: str, value: object) -> None:
    """Raise unless the value is a dense tensor of one of ``FLOATS``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{argument}: expected a dense tensor, got {kind}")
    if value.dtype not in FLOATS:
        bits = "16, 32 or 64 bits per element" if value.is_floating_point() else "a floating-point tensor"
        raise TypeError(f"{argument}: expected {bits}, got {value.dtype}")


def expect_dims(argument: str, value: Tensor | None, dims: int) -> None:
    """Raise unless the tensor has this many dimensions; None has any."""
    if value is not None and value.dim() != dims:
        expect(False, argument, f"{dims} dimensions", value.shape)


def expect_shape(argument: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless the tensor has exactly this shape; None has any."""
    if value is not None and value.shape != shape:  # the message is made only now: compilers see symbols
        expect(False, argument, f"shape {tuple(shape)}", tuple(value.shape))


def expect_device(argument: str, value: Tensor, other_argument: str, other: Tensor) -> None:
    """Raise unless two tensors share a device."""
    if value.device != other.device:
        raise TypeError(f"{argument}: expected device {other.device} as {other_argument}, got {value.device}")


def expect_like(argument: str, value: Tensor, other_argument: str, other: Tensor) -> None:
    """Raise unless two tensors share device and dtype."""
    expect_device(argument, value, other_argument, other)
    if value.dtype != other.dtype:
        raise TypeError(f"{argument}: expected dtype {other.dtype} as {other_argument}, got {value.dtype}")


@dataclass(frozen=True)
class Range:
    """Numbers from a minimum to a maximum, both of them included."""

    minimum: float = -sys.float_info.max
    maximum: float = sys.float_info.max

    def __contains__(self, value: float) -> bool:
        return self.minimum <= value <= self.maximum


@dataclass(frozen=True)
class OneOf:
    """A few values."""

    values: tuple[object, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.values


def shown(value: object) -> str:
    """A value as a message shows it: in one line."""
    text = repr(value)
    return f"a value of type {type(value).__name__}" if "\n" in text or len(text) > 80 else text


def scalar(
    argument: str, value: Any, kind: type, optional: bool = False, allowed: Range | OneOf | None = None
) -> Any:
    """A scalar argument as a plain ``bool``, ``int``, ``float`` or ``str``; raise unless it is one.

    Numbers are finite. NumPy's are accepted.
    """
    if type(value) is kind and (allowed is None or value in allowed):  # a shorter way for what is right
        return value
    if value is None and optional:
        return None
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{argument}: expected a number, got {shown(value)}")
        try:
            value = float(value)
        except OverflowError:  # an integer of hundreds of digits
            value = math.inf
        expect(math.isfinite(value), argument, "a finite number", value)
    elif kind is int:
        if not is_integer(value):
            raise TypeError(f"{argument}: expected an integer, got {shown(value)}")
    elif not isinstance(value, kind):
        article = {bool: "True or False", str: "a string"}[kind]
        raise TypeError(f"{argument}: expected {article}, got {shown(value)}")
    if isinstance(allowed, OneOf):
        expect_choice(argument, value, allowed.values)
    elif allowed is not None:
        expect(value >= allowed.minimum, argument, f"at least {allowed.minimum}", value)
        expect(value <= allowed.maximum, argument, f"at most {allowed.maximum}", value)
    return value


def is_integer(value: object) -> bool:
    """Whether the value is an integer, NumPy's included; a bool is none."""
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)


def expect_integer(argument: str, value: object, minimum: int) -> None:
    """Raise unless the value is an integer, at least ``minimum``, and a size that a tensor can have."""
    scalar(argument, value, int, allowed=Range(minimum, sys.maxsize))


def expect_choice(argument: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless the value is one of the choices."""
    expect(value in choices, argument, f"one of {choices}", shown(value))
