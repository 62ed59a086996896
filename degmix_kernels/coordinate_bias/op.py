"""A bias by row or column, the public function: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import autocast, backend, checks, maps
from degmix_kernels.coordinate_bias import reference

if backend.HAS_TRITON:
    from degmix_kernels.coordinate_bias.autograd import bias_op


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
        columns: (G, S, min(H, 3), W), likewise.

    Returns:
        Shape, dtype and layout of ``x``. The gradients are sums of the incoming one.

    Raises:
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Liu et al., arXiv 1807.03247 (CoordConv); DeGMix, arXiv 2308.05721, computes its offsets so.
    """
    for name, tensor in {"x": x, "rows": rows, "columns": columns}.items():
        checks.expect_tensor(name, tensor, dims=4)
        checks.expect_device(name, tensor, "x", x)
    (x,) = autocast.cast_inputs(x.device, x)
    batch, channels, height, width = x.shape
    groups, of_rows, of_columns = rows.shape[0], rows.shape[1], columns.shape[1]
    checks.expect(channels > 0 and height > 0 and width > 0, "x", "no empty dimension but the batch", x.shape)
    checks.expect_shape("rows", rows, (groups, of_rows, height, min(width, 3)))
    checks.expect_shape("columns", columns, (groups, of_columns, min(height, 3), width))
    checks.expect_shape("x", x, (batch, groups * (of_rows + of_columns), height, width))
    if backend.runs_triton("coordinate_bias", x.device, x.dtype):
        return bias_op(x, rows, columns)
    output = reference.coordinate_bias(x, rows, columns)
    last = maps.is_channels_last(x)
    return output.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
