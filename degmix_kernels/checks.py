"""Argument checks of every op, in one voice: argument, what was expected, what came.

A check runs before any launch and raises ``TypeError`` for a wrong type, dtype or device and ``ValueError``
for a wrong shape or value.
"""

from __future__ import annotations

from torch import Tensor


def expect(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise ``ValueError`` naming the argument, what was expected and what came, unless true."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def expect_tensor(argument: str, value: object, dims: int | None = None) -> None:
    """Raise unless the value is a floating-point tensor, with ``dims`` dimensions if given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{argument}: expected a floating-point tensor, got {value.dtype}")
    if dims is not None:
        expect(value.dim() == dims, argument, f"{dims} dimensions", f"shape {tuple(value.shape)}")


def expect_shape(argument: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless the tensor has exactly this shape."""
    expect(tuple(value.shape) == shape, argument, f"shape {shape}", tuple(value.shape))


def expect_like(argument: str, value: Tensor, other_argument: str, other: Tensor) -> None:
    """Raise unless two tensors share device and dtype."""
    if value.device != other.device:
        raise TypeError(f"{argument}: expected device {other.device} as {other_argument}, got {value.device}")
    if value.dtype != other.dtype:
        raise TypeError(f"{argument}: expected dtype {other.dtype} as {other_argument}, got {value.dtype}")


def expect_choice(argument: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless the value is one of the choices."""
    expect(value in choices, argument, "one of " + ", ".join(repr(c) for c in choices), repr(value))
