"""The backward pass of the general ``deform_conv2d``: as it is, or by columns.

By columns: the columns' gradient is one product; one kernel makes of it the gradients of input, offset and
mask, and leaves the columns in its place; the weight's gradient is another product.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.cases.deform_conv import convolution
from bench.cases.op import Draw
from bench.cases.shapes import SMALL_OFFSETS, WILD_OFFSETS, Convolution
from bench.gpu.decide.common import BF16, FP32, LAST, backward, product, torchvision_rows
from bench.gpu.decide.meter import Meter
from degmix_kernels import deform_conv2d
from degmix_kernels.deform_conv import reference
from degmix_kernels.deform_conv.general.kernels import (
    corner_address,
    corner_weights,
    gather,
    load_mask,
    sample_points,
)
from degmix_kernels.deform_conv.sampling import corners_on_map, is_number, scatter
from degmix_kernels.launch import Launch, run
from degmix_kernels.maps import ceil_div

DETECTION = partial(Convolution, 8, 256, 100, 152)
SMALL = partial(Convolution, 1, 16, 4, 5)
ALL = ("input", "offset", "weight", "bias", "mask")
PARTS = (("input", "offset", "mask"), ("input",), ("weight",))
CHUNKS = (70, 32, 16)  # MB of columns at a time; an image has 70
BLOCK_PIXELS = 16
TAPS = 9


@triton.jit
def scatter_columns(
    col_ptr,  # (pixels of the chunk, 9, CHANNELS): the columns' gradient comes in, the columns go out
    input_ptr,  # (pixels, CHANNELS) of the image
    offset_ptr,  # (18, pixels)
    mask_ptr,  # (9, pixels)
    grad_input_ptr,  # as input, fp32, added to
    grad_offset_ptr,  # as offset
    grad_mask_ptr,  # as mask
    height,
    width,
    first_pixel,  # of the chunk
    end_pixel,
    CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """One program: BLOCK_PIXELS pixels at one tap of a 3×3 kernel, stride 1, padding 1."""
    program = tl.program_id(0)
    tap = program % 9
    local = program // 9 * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel, pixels = first_pixel + local, height * width
    valid = pixel < end_pixel
    low_y, low_x, fraction_y, fraction_x = sample_points(
        offset_ptr, 0, 0, 1, tap, pixel, valid, height, width, 9, 3, width, pixels, 1, 1, 1, 1, 1, 1, False
    )
    modulation = load_mask(mask_ptr, 0, 0, 1, tap, 9, pixel, valid, pixels, False)
    weight_00, weight_01, weight_10, weight_11 = corner_weights(fraction_y, fraction_x, modulation)
    on_00, on_01, on_10, on_11 = corners_on_map(low_y, low_x, valid, height, width)
    channel = tl.arange(0, CHANNELS)[None, :]
    at = (local[:, None] * 9 + tap) * CHANNELS + channel
    gradient = tl.load(col_ptr + at, mask=valid[:, None], other=0.0).to(tl.float32)
    address = corner_address(0, low_y, low_x, CHANNELS, height, width, False)[:, None] + channel
    row = width * CHANNELS
    value_00, value_01, value_10, value_11 = gather(
        input_ptr, address, row, CHANNELS, channel >= 0, on_00, on_01, on_10, on_11
    )
    columns = weight_00[:, None] * value_00 + weight_01[:, None] * value_01
    columns += weight_10[:, None] * value_10 + weight_11[:, None] * value_11
    tl.store(col_ptr + at, columns.to(col_ptr.dtype.element_ty), mask=valid[:, None])
    scatter(grad_input_ptr, address, weight_00[:, None] * gradient, on_00[:, None], 1.0, False)
    scatter(grad_input_ptr, address + CHANNELS, weight_01[:, None] * gradient, on_01[:, None], 1.0, False)
    scatter(grad_input_ptr, address + row, weight_10[:, None] * gradient, on_10[:, None], 1.0, False)
    scatter(
        grad_input_ptr, address + row + CHANNELS, weight_11[:, None] * gradient, on_11[:, None], 1.0, False
    )
    # As in general_backward_kernels: a sample is v00 + fy·dy + fx·dx + fy·fx·dyx, summed over channels.
    dy, dx = value_10 - value_00, value_01 - value_00
    sum_value, sum_dy, sum_dx = (
        tl.sum(gradient * value_00, 1),
        tl.sum(gradient * dy, 1),
        tl.sum(gradient * dx, 1),
    )
    sum_dyx = tl.sum(gradient * (value_11 - value_01 - dy), 1)
    address_y = 2 * tap * pixels + pixel
    grad_y, grad_x = (
        modulation * (sum_dy + fraction_x * sum_dyx),
        modulation * (sum_dx + fraction_y * sum_dyx),
    )
    offset_y = tl.load(offset_ptr + address_y, mask=valid, other=0.0)
    offset_x = tl.load(offset_ptr + address_y + pixels, mask=valid, other=0.0)
    grad_y = tl.where((low_y < -1) & is_number(offset_y), 0.0, grad_y)
    grad_x = tl.where((low_x < -1) & is_number(offset_x), 0.0, grad_x)
    tl.store(grad_offset_ptr + address_y, grad_y, mask=valid)
    tl.store(grad_offset_ptr + address_y + pixels, grad_x, mask=valid)
    grad_mask = sum_value + fraction_y * sum_dy + fraction_x * (sum_dx + fraction_y * sum_dyx)
    grad_mask = grad_mask.to(grad_mask_ptr.dtype.element_ty)
    tl.store(grad_mask_ptr + tap * pixels + pixel, grad_mask, mask=valid)


class ByColumns:
    """The backward pass by columns of so many pixels at a time.

    Args:
        arguments: of ``deform_conv2d``, input channels last.
        grad: of the output, channels last.
    """

    def __init__(self, arguments: Mapping[str, Tensor], grad: Tensor) -> None:
        self.input, self.offset, self.mask = (arguments[name] for name in ("input", "offset", "mask"))
        self.batch, self.channels, self.height, self.width = self.input.shape
        self.pixels = self.height * self.width
        weight = arguments["weight"].contiguous(**LAST)
        self.matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (out channels, 9 · channels)
        self.grad = grad
        self.rows = grad.permute(0, 2, 3, 1).flatten(1, 2)  # (N, pixels, out channels)
        self.sums = torch.zeros_like(self.input, dtype=FP32)
        self.grad_offset, self.grad_mask = torch.empty_like(self.offset), torch.empty_like(self.mask)

    def __call__(self, chunk: int) -> tuple[Tensor, ...]:
        """Gradients of input, offset, weight, bias and mask."""
        self.sums.zero_()
        total = torch.zeros_like(self.matrix, dtype=FP32)
        for image in range(self.batch):
            for first in range(0, self.pixels, chunk):
                rows = self.rows[image, first : first + chunk]
                columns = rows @ self.matrix
                self.scatter(image, first, columns)
                total += product(rows.mT, columns)
        weight = total.view(-1, 3, 3, self.channels).permute(0, 3, 1, 2).to(BF16)
        bias = self.grad.sum((0, 2, 3), dtype=FP32).to(BF16)
        return self.sums.to(BF16), self.grad_offset, weight, bias, self.grad_mask

    def scatter(self, image: int, first: int, columns: Tensor) -> None:
        """Gradients of input, offset and mask of a chunk of pixels; columns where their gradient was."""
        arguments = {
            "col_ptr": columns, "input_ptr": self.input[image], "offset_ptr": self.offset[image],
            "mask_ptr": self.mask[image], "grad_input_ptr": self.sums[image],
            "grad_offset_ptr": self.grad_offset[image], "grad_mask_ptr": self.grad_mask[image],
            "height": self.height, "width": self.width, "first_pixel": first,
            "end_pixel": first + columns.shape[0],
        }  # fmt: skip
        constants = {"CHANNELS": self.channels, "BLOCK_PIXELS": BLOCK_PIXELS}
        programs = TAPS * ceil_div(columns.shape[0], BLOCK_PIXELS)
        run(Launch(scatter_columns, programs, arguments, constants, num_warps=8), self.input.device)


def rows(meter: Meter) -> None:
    """The section."""
    for spread in (SMALL_OFFSETS,) if meter.dry else (SMALL_OFFSETS, WILD_OFFSETS):
        shape = (SMALL if meter.dry else DETECTION)(spread)
        arguments = convolution(Draw(meter.device, BF16), shape).arguments
        planar, arguments["input"] = arguments["input"], arguments["input"].contiguous(**LAST)
        grad = torch.randn_like(arguments["input"])
        name = f"3x3 bwd, sigma {spread:.0f}"
        _rows(meter, name, arguments, grad)
        torchvision_rows(meter, name, arguments | {"input": planar}, ALL, grad.contiguous())


def _rows(meter: Meter, name: str, arguments: dict[str, Any], grad: Tensor) -> None:
    by_columns = ByColumns(arguments, grad)
    of_an_image = 2 * by_columns.pixels * by_columns.matrix.numel()  # FLOPs of one product
    checked = {
        "flops": 2 * by_columns.batch * of_an_image,
        "expected": cache(lambda: backward(reference.deform_conv2d, arguments, ALL, [grad], torch.float64)()),
    }
    meter.row(name, "present, all", backward(deform_conv2d, arguments, ALL, [grad]), **checked)
    for wanted in PARTS:
        meter.row(name, f"present, {', '.join(wanted)}", backward(deform_conv2d, arguments, wanted, [grad]))
    of_a_pixel = by_columns.matrix.shape[1] * grad.element_size()
    for megabytes in CHUNKS:
        chunk = int(1e6 * megabytes / of_a_pixel) // BLOCK_PIXELS * BLOCK_PIXELS
        chunk = min(megabytes // 2 if meter.dry else chunk, by_columns.pixels)
        meter.row(name, f"by columns, {megabytes} MB at a time", partial(by_columns, chunk), **checked)

    name, rows, matrix = f"{name}, an image", by_columns.rows[0], by_columns.matrix
    columns = rows @ matrix
    meter.row(name, "columns' gradient", lambda: rows @ matrix, flops=of_an_image)
    meter.row(name, "weight's gradient", lambda: product(rows.mT, columns), flops=of_an_image)
    meter.row(name, "scatter", lambda: by_columns.scatter(0, 0, columns), bytes=2 * columns.nbytes)
