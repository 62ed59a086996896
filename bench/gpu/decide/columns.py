"""The backward pass of the general ``deform_conv2d`` by columns: 3×3, stride 1, padding 1.

The columns' gradient is one product; one kernel makes of it the gradients of input, offset and mask, and
leaves the columns in its place; the weight's gradient is another product.

The input's gradient is scattered, or most of it comes from products with tents: a pixel has a share in a
bilinear sample that falls off along both axes like a tent, max(0, 1 - distance). The shares of a patch of the
map in all samples of a tile of output pixels are a matrix, made in registers. Its product with the columns'
gradient, summed over the taps, is added to the map: once per pixel of the patch. Most samples lie in their
patch; those that do not are scattered.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.gpu.decide.common import FP32, LAST, product, with_backward
from degmix_kernels import deform_conv2d
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
from degmix_kernels.product import multiply, precision

TAPS = 9
BLOCK_PIXELS = 16  # of a program that scatters
TILE, PATCH = 8, 16  # side of a tile of output pixels, and of the patch around it
BLOCK_CHANNELS = 128  # of a program with tents


@triton.jit
def load_offsets(offset_ptr, pixel, tap, valid, pixels):
    """Coordinates y and x of samples at a tap, (18, pixels)."""
    offset_ptr += 2 * tap * pixels + pixel
    return tl.load(offset_ptr, mask=valid, other=0.0), tl.load(offset_ptr + pixels, mask=valid, other=0.0)


@triton.jit
def place(offset_y, offset_x, y, x, tap, TILE: tl.constexpr, PATCH: tl.constexpr):
    """Where samples are in the patch of their tile, and whether: not where NaN. 3×3, stride 1, padding 1."""
    MARGIN: tl.constexpr = (PATCH - TILE) // 2 - 1
    place_y = (y % TILE + MARGIN + tap // 3).to(tl.float32) + offset_y
    place_x = (x % TILE + MARGIN + tap % 3).to(tl.float32) + offset_x
    inside = (place_y >= 0) & (place_y <= PATCH - 1) & (place_x >= 0) & (place_x <= PATCH - 1)
    return place_y, place_x, inside


@triton.jit
def add_tents(
    col_ptr,  # (pixels, 9, CHANNELS), the columns' gradient
    offset_ptr,  # (18, pixels)
    mask_ptr,  # (9, pixels)
    grad_input_ptr,  # (pixels, CHANNELS), fp32, added to
    height,
    width,
    tiles_x,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    PATCH: tl.constexpr,
):
    """Columns of samples in the patch of their tile. One program: BLOCK_CHANNELS channels of a tile."""
    BLOCKS: tl.constexpr = CHANNELS // BLOCK_CHANNELS
    program, pixels = tl.program_id(0), height * width
    channel = program % BLOCKS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    first_y, first_x = program // BLOCKS // tiles_x * TILE, program // BLOCKS % tiles_x * TILE
    y, x = first_y + tl.arange(0, TILE * TILE) // TILE, first_x + tl.arange(0, TILE * TILE) % TILE
    valid, pixel = (y < height) & (x < width), y * width + x
    line = tl.arange(0, PATCH).to(tl.float32)[:, None]
    total = tl.zeros((PATCH * PATCH, BLOCK_CHANNELS), tl.float32)
    for tap in range(9):
        offset_y, offset_x = load_offsets(offset_ptr, pixel, tap, valid, pixels)
        place_y, place_x, inside = place(offset_y, offset_x, y, x, tap, TILE, PATCH)
        modulation = load_mask(mask_ptr, 0, 0, 1, tap, 9, pixel, valid, pixels, False)
        modulation = tl.where(inside, modulation, 0.0)
        place_y, place_x = tl.where(inside, place_y, 0.0), tl.where(inside, place_x, 0.0)
        tent_y = tl.maximum(1 - tl.abs(line - place_y[None, :]), 0.0) * modulation[None, :]
        tent_x = tl.maximum(1 - tl.abs(line - place_x[None, :]), 0.0)
        tents = tl.reshape(tent_y[:, None, :] * tent_x[None, :, :], (PATCH * PATCH, TILE * TILE))
        at = (pixel[:, None] * 9 + tap) * CHANNELS + channel
        gradient = tl.load(col_ptr + at, mask=valid[:, None], other=0.0)
        total = multiply(tents.to(gradient.dtype), gradient, total, PRECISION)
    y = first_y - (PATCH - TILE) // 2 + tl.arange(0, PATCH * PATCH) // PATCH
    x = first_x - (PATCH - TILE) // 2 + tl.arange(0, PATCH * PATCH) % PATCH
    on_map = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = (y * width + x)[:, None] * CHANNELS + channel
    tl.atomic_add(grad_input_ptr + at, total, mask=on_map[:, None], sem="relaxed")


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
    TILE: tl.constexpr,
    PATCH: tl.constexpr,
    TENTS: tl.constexpr,  # whether only what add_tents leaves out is added to the input's gradient
):
    """One program: BLOCK_PIXELS pixels at one tap."""
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
    address_y = 2 * tap * pixels + pixel
    offset_y, offset_x = load_offsets(offset_ptr, pixel, tap, valid, pixels)
    if TENTS:
        _, _, inside = place(offset_y, offset_x, pixel // width, pixel % width, tap, TILE, PATCH)
        outside = inside == 0
        on_00, on_01, on_10, on_11 = on_00 & outside, on_01 & outside, on_10 & outside, on_11 & outside
    scatter(grad_input_ptr, address, weight_00[:, None] * gradient, on_00[:, None], 1.0, False)
    scatter(grad_input_ptr, address + CHANNELS, weight_01[:, None] * gradient, on_01[:, None], 1.0, False)
    address += row
    scatter(grad_input_ptr, address, weight_10[:, None] * gradient, on_10[:, None], 1.0, False)
    scatter(grad_input_ptr, address + CHANNELS, weight_11[:, None] * gradient, on_11[:, None], 1.0, False)
    # As in general_backward_kernels: a sample is v00 + fy·dy + fx·dx + fy·fx·dyx, summed over channels.
    dy, dx = value_10 - value_00, value_01 - value_00
    sum_value, sum_dy = tl.sum(gradient * value_00, 1), tl.sum(gradient * dy, 1)
    sum_dx = tl.sum(gradient * dx, 1)
    sum_dyx = tl.sum(gradient * (value_11 - value_01 - dy), 1)
    grad_y = modulation * (sum_dy + fraction_x * sum_dyx)
    grad_x = modulation * (sum_dx + fraction_y * sum_dyx)
    grad_y = tl.where((low_y < -1) & is_number(offset_y), 0.0, grad_y)
    grad_x = tl.where((low_x < -1) & is_number(offset_x), 0.0, grad_x)
    tl.store(grad_offset_ptr + address_y, grad_y, mask=valid)
    tl.store(grad_offset_ptr + address_y + pixels, grad_x, mask=valid)
    grad_mask = sum_value + fraction_y * sum_dy + fraction_x * (sum_dx + fraction_y * sum_dyx)
    grad_mask = grad_mask.to(grad_mask_ptr.dtype.element_ty)
    tl.store(grad_mask_ptr + tap * pixels + pixel, grad_mask, mask=valid)


def by_columns(megabytes: float = 70, tents: bool = False) -> Callable[..., Tensor]:
    """``deform_conv2d`` with this backward pass: columns of so many MB at a time, or tents."""

    def forward(
        x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return deform_conv2d(x, offset, weight, bias, padding=1, mask=mask), (x, offset, weight, mask)

    def backward(grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        x = x.contiguous(**LAST)
        _, channels, height, width = x.shape
        pixels, tiles_x = height * width, ceil_div(width, TILE)
        matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (out channels, 9 · channels)
        chunk = int(1e6 * megabytes / (matrix.shape[1] * x.element_size())) // BLOCK_PIXELS * BLOCK_PIXELS
        chunk = pixels if tents else min(chunk, pixels)
        block = min(BLOCK_CHANNELS, channels)
        sums = torch.zeros_like(x, dtype=FP32)
        grad_offset, grad_mask = torch.empty_like(offset), torch.empty_like(mask)
        total = torch.zeros_like(matrix, dtype=FP32)
        sizes = {"height": height, "width": width}
        constants = {"CHANNELS": channels, "TILE": TILE, "PATCH": PATCH}
        for image, first in ((image, first) for image in range(len(x)) for first in range(0, pixels, chunk)):
            rows = grad[image].flatten(1).mT[first : first + chunk]
            columns = rows @ matrix
            pointers = {
                "col_ptr": columns, "offset_ptr": offset[image], "mask_ptr": mask[image],
                "grad_input_ptr": sums[image],
            }  # fmt: skip
            if tents:
                programs = ceil_div(height, TILE) * tiles_x * (channels // block)
                own = constants | {"BLOCK_CHANNELS": block, "PRECISION": precision(x.dtype)}
                run(Launch(add_tents, programs, pointers | sizes | {"tiles_x": tiles_x}, own, 16), x.device)
            pointers |= {
                "input_ptr": x[image], "grad_offset_ptr": grad_offset[image],
                "grad_mask_ptr": grad_mask[image], "first_pixel": first, "end_pixel": first + len(columns),
            }  # fmt: skip
            own = constants | {"BLOCK_PIXELS": BLOCK_PIXELS, "TENTS": tents}
            programs = TAPS * ceil_div(len(columns), BLOCK_PIXELS)
            run(Launch(scatter_columns, programs, pointers | sizes, own, num_warps=8), x.device)
            total += product(rows.mT, columns)
        grad_weight = total.view(-1, 3, 3, channels).permute(0, 3, 1, 2).to(weight.dtype)
        grad_bias = grad.sum((0, 2, 3), dtype=FP32).to(weight.dtype)
        return sums.to(x.dtype), grad_offset, grad_weight, grad_bias, grad_mask

    of_tensors = with_backward(forward, backward)
    return lambda input, offset, weight, bias, padding, mask: of_tensors(input, offset, weight, bias, mask)
