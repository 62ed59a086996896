"""Tolerances and comparisons for tests of these ops, and of models that use them.

The yardstick is the relative L2 distance to an fp64 reference that got the very same (rounded) inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def tolerance(dtype: torch.dtype, reduction: int) -> float:
    """Largest relative L2 error a correct op may show.

    An op rounds to ``dtype`` a few times (operands of a matrix product, the result): each costs a relative
    L2 error of about eps/4, independent of the reduction because the errors are as random as the terms.
    Sums run in fp32 (fp64 for fp64), where rounding errors grow as a random walk to eps/5 · √reduction. The
    factors 2 and 1/2 allow for several roundings, and for few elements, where luck does not average out.

    Args:
        dtype: dtype of the inputs.
        reduction: number of terms in the longest sum behind one element.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    rounding, summing = torch.finfo(dtype).eps, torch.finfo(accumulator).eps
    return 2 * rounding + summing / 2 * math.sqrt(max(reduction, 1))


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖`` in fp64; 0 for two zero (or empty) tensors, NaN if any is NaN."""
    expected = expected.detach().double()
    actual = actual.detach().double().to(expected.device)
    difference, size = (actual - expected).norm().item(), expected.norm().item()
    if size == 0:
        return difference if difference == 0 or math.isnan(difference) else math.inf
    return difference / size


def assert_close(
    actual: Tensor, expected: Tensor, reduction: int, dtype: torch.dtype | None = None, name: str = "output"
) -> None:
    """Fail unless ``actual`` is within the derived tolerance of the fp64 ``expected``. A NaN never passes.

    Args:
        actual: the tensor under test.
        expected: the reference, best computed in fp64, of the same shape.
        reduction: number of terms in the longest sum behind one element.
        dtype: dtype the op computed in, if not that of ``actual`` (an fp32 gradient of a bf16 op, say).
        name: what is compared, for the message.

    Raises:
        AssertionError: naming the error and the tolerance.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    limit = tolerance(dtype or actual.dtype, reduction)
    error = relative_l2(actual, expected)
    if not error <= limit:  # written so that NaN fails
        raise AssertionError(f"{name}: relative L2 error {error:.3e}, tolerance {limit:.3e}")


_UNINITIALISED = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


class _Poison(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _UNINITIALISED:
            is_float = result.dtype.is_floating_point
            result.fill_(math.nan if is_float else torch.iinfo(result.dtype).max // 3)
        return result


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill every uninitialised allocation with NaN (integers: a large value), so unwritten outputs show."""
    with _Poison():
        yield
