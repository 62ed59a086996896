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

from degmix_kernels.tracers import transparent

RSQRT = 2**-22.9  # PTX's bound of the relative error of rsqrt.approx.f32


def tolerance(dtype: torch.dtype, reduction: int, roots: int = 0) -> float:
    """Largest relative L2 error a correct op may show.

    An op rounds to ``dtype`` a few times (operands of a matrix product, the result): each costs a relative
    L2 error of about eps/4, independent of the reduction because the errors are as random as the terms.
    Sums run in fp32 (fp64 for fp64), where rounding errors grow as a random walk to eps/5 · √reduction. The
    factors 2 and 1/2 allow for several roundings, and for few elements, where luck does not average out.

    A GPU's exp2, division and reciprocal square root in fp32 err by up to 1.4 eps, in the quadratic mean by
    0.3 eps. The factor 2 allows for that, too, where the errors of elements are independent. They are not if
    one reciprocal square root is a factor of all elements: its error then counts in full, each time.

    Args:
        dtype: dtype of the inputs.
        reduction: number of terms in the longest sum behind one element.
        roots: power of the one reciprocal square root that is a factor of all elements.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    rounding, summing = torch.finfo(dtype).eps, torch.finfo(accumulator).eps
    shared = 0.0 if dtype == torch.float64 else roots * RSQRT
    return 2 * rounding + shared + summing / 2 * math.sqrt(max(reduction, 1))


def relative_l2(actual: Tensor, expected: Tensor, terms: Tensor | None = None) -> float:
    """``‖actual − expected‖ / ‖expected‖`` in fp64; 0 for two zero (or empty) tensors, NaN if any is NaN.

    Args:
        actual: the tensor under test.
        expected: the reference.
        terms: for an ``expected`` that is about zero because terms cancel: these terms. Every term is rounded
            by itself, so the error is as large as theirs, and ‖terms‖ replaces ‖expected‖ if it is larger.
    """
    expected = expected.detach().double()
    actual = actual.detach().double().to(expected.device)
    difference, size = (actual - expected).norm().item(), expected.norm().item()
    if terms is not None:
        size = max(size, terms.detach().double().norm().item())
    if size == 0:
        return difference if difference == 0 or math.isnan(difference) else math.inf
    return difference / size


def assert_close(
    actual: Tensor,
    expected: Tensor,
    reduction: int,
    dtype: torch.dtype | None = None,
    name: str = "output",
    roots: int = 0,
    terms: Tensor | None = None,
) -> None:
    """Fail unless ``actual`` is within the derived tolerance of the fp64 ``expected``. A NaN never passes.

    Args:
        actual: the tensor under test.
        expected: the reference, best computed in fp64, of the same shape.
        reduction: number of terms in the longest sum behind one element.
        dtype: dtype the op computed in, if not that of ``actual`` (an fp32 gradient of a bf16 op, say).
        name: what is compared, for the message.
        roots: power of the one reciprocal square root that is a factor of all elements.
        terms: what cancels, where ``expected`` is about zero.

    Raises:
        AssertionError: naming the error and the tolerance.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    limit = tolerance(dtype or actual.dtype, reduction, roots)
    error = relative_l2(actual, expected, terms)
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
def inside_ops(mode: TorchDispatchMode) -> Iterator[TorchDispatchMode]:
    """Enter a dispatch mode that sees inside the ops: their allocations, and PyTorch's own products.

    Without it a mode sees each op as one call. Launches of Triton kernels are seen by no mode.
    """
    with transparent(True), mode:
        yield mode


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill every uninitialised allocation with NaN (integers: a large value), so unwritten outputs show."""
    with inside_ops(_Poison()):
        yield
