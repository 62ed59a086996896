"""A bias by row or column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from degmix_kernels import backend, checks, maps
from degmix_kernels.coordinate_bias import reference
from degmix_kernels.define import OwnDtype, define
from degmix_kernels.launch import run

if backend.HAS_TRITON:
    from degmix_kernels.coordinate_bias import plan


class Call(NamedTuple):
    """Arguments of :func:`coordinate_bias`."""

    x: Tensor
    rows: OwnDtype
    columns: OwnDtype


def coordinate_bias(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Add to each channel a bias that depends on the pixel's row alone, or on its column alone.

    But for the borders: a zero-padded 3×3 convolution of channels that hold coordinates, as CoordConv's, is
    the same along a row but for the first and the last pixel. So a table has three columns (or rows): what
    belongs to the first, to all in between, and to the last. The map that they stand for is never in memory.

    The channels of x are G groups; of each the first R have a bias by row, the other S one by column.

    Under autocast ``x`` is cast to the autocast dtype and the result has it; the tables keep their dtype
    (keep them fp32); doubles are left alone.

    Args:
        x: (B, G·(R + S), H, W), floating point. channels_last in, channels_last out.
        rows: (G, R, H, min(W, 3)), of any floating-point dtype; a map of fewer columns has no more.
        columns: (G, S, min(H, 3), W), of any floating-point dtype.

    Returns:
        Shape, dtype and layout of ``x``. The gradients are sums of the incoming one.

    Raises:
        TypeError: for a wrong type, dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Liu et al., arXiv 1807.03247 (CoordConv); DeGMix, arXiv 2308.05721, computes its offsets so.
    """
    call = op.checked(x, rows, columns)
    x, rows, columns = call
    checks.expect_dims("x", x, 4)
    checks.expect_dims("rows", rows, 4)
    checks.expect_dims("columns", columns, 4)
    batch, channels, height, width = shape = x.shape
    (groups, of_rows, *_), of_columns = rows.shape, columns.shape[1]
    checks.expect(channels > 0 and height > 0 and width > 0, "x", "no empty dimension but the batch", shape)
    checks.expect_shape("rows", rows, (groups, of_rows, height, min(width, 3)))
    checks.expect_shape("columns", columns, (groups, of_columns, min(height, 3), width))
    checks.expect_shape("x", x, (batch, groups * (of_rows + of_columns), height, width))
    if op.runs_triton(call):
        return op(call)
    return maps.laid_out(x, reference.coordinate_bias(*call))[0]


def _outputs(call: Call) -> Tensor:
    return maps.empty_like(call.x)


def _forward(call: Call, output: Tensor) -> None:
    x = call.x.contiguous(memory_format=maps.memory_format(output))
    run(plan.plan_forward(x, call.rows.contiguous(), call.columns.contiguous(), output), x.device)


def _backward(
    call: Call, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Call
) -> dict[str, Tensor | None]:
    rows, columns = call.rows, call.columns
    sizes = rows.shape[1], columns.shape[1]
    batch, _, height, width = grads[0].shape
    grad = grads[0].view(batch, rows.shape[0], sum(sizes), height, width)
    of_rows, of_columns = grad.split_with_sizes(sizes, 2)
    return {
        "rows": _sum_middle(of_rows, 4, rows) if wanted.rows else None,
        "columns": _sum_middle(of_columns, 3, columns) if wanted.columns else None,
    }


def _sum_middle(grad: Tensor, axis: int, table: Tensor) -> Tensor:
    """Sum over images, and along an axis but for its first and last slice; fp32, laid out as the table."""
    size = grad.shape[axis]
    if size <= 3:
        total = grad.sum(0, dtype=torch.float32)
    else:
        parts = grad.split_with_sizes([1, size - 2, 1], axis)
        total = torch.stack([part.sum((0, axis), dtype=torch.float32) for part in parts], axis - 1)
    return maps.laid_out(table, total)[0]


op = define("coordinate_bias", Call, _outputs, _forward, _backward, products=lambda call: 0, passed_on=("x",))
