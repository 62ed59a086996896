"""``deform_conv2d`` with few channels per offset group, as in video super-resolution: vectors of a group."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.gpu.decide.common import LAST
from bench.harness.case import Unavailable
from degmix_kernels.deform_conv.general.kernels import corner_weights, weight_address
from degmix_kernels.deform_conv.sampling import corners_on_map, locate, tensor_address
from degmix_kernels.launch import Launch, run
from degmix_kernels.maps import ceil_div
from degmix_kernels.product import multiply, precision

BLOCK_PIXELS = 64  # of a program


@triton.jit
def forward_groups(
    input_ptr,  # (N, pixels, CHANNELS)
    offset_ptr,  # (N, offset groups, 9, 2, pixels)
    mask_ptr,  # (N, offset groups, 9, pixels)
    weight_ptr,  # (CHANNELS, 9, CHANNELS)
    bias_ptr,
    output_ptr,  # as input
    height,
    width,
    offset_groups,
    steps,  # 9 · sets of groups
    CHANNELS: tl.constexpr,  # in and out
    GROUPS: tl.constexpr,  # offset groups at a time
    WITHIN: tl.constexpr,  # channels of an offset group
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """3×3, stride 1, padding 1. One program: BLOCK_PIXELS pixels of an image."""
    program = tl.program_id(0)
    pixels = height * width
    pixel_blocks = tl.cdiv(pixels, BLOCK_PIXELS)
    image = (program // pixel_blocks).to(tl.int64)
    pixel = program % pixel_blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    out, within = tl.arange(0, CHANNELS), tl.arange(0, WITHIN)[None, None, :]
    valid = pixel < pixels
    input_ptr += image * pixels * CHANNELS
    offset_ptr += image * 18 * offset_groups * pixels
    mask_ptr += image * 9 * offset_groups * pixels
    row = width * CHANNELS
    product = tl.zeros((BLOCK_PIXELS, CHANNELS), tl.float32)
    for step in range(0, steps):
        tap, first = step % 9, step // 9 * GROUPS
        group = first + tl.arange(0, GROUPS)[None, :]
        live = valid[:, None] & (group < offset_groups)  # (BLOCK_PIXELS, GROUPS)
        point = (group * 9 + tap) * pixels
        at = 2 * point + pixel[:, None]
        offset_y = tl.load(offset_ptr + at, mask=live, other=0.0)
        offset_x = tl.load(offset_ptr + at + pixels, mask=live, other=0.0)
        modulation = tl.load(mask_ptr + point + pixel[:, None], mask=live, other=0.0).to(tl.float32)
        base_y, base_x = (pixel // width + tap // 3 - 1)[:, None], (pixel % width + tap % 3 - 1)[:, None]
        low_y, low_x, fraction_y, fraction_x = locate(offset_y, offset_x, base_y, base_x, height, width)
        weight_00, weight_01, weight_10, weight_11 = corner_weights(fraction_y, fraction_x, modulation)
        on_00, on_01, on_10, on_11 = corners_on_map(low_y, low_x, live, height, width)
        address = ((low_y * width + low_x) * CHANNELS + group * WITHIN)[:, :, None] + within
        value_00 = tl.load(input_ptr + address, mask=on_00[:, :, None], other=0.0).to(tl.float32)
        value_01 = tl.load(input_ptr + address + CHANNELS, mask=on_01[:, :, None], other=0.0).to(tl.float32)
        address += row
        value_10 = tl.load(input_ptr + address, mask=on_10[:, :, None], other=0.0).to(tl.float32)
        value_11 = tl.load(input_ptr + address + CHANNELS, mask=on_11[:, :, None], other=0.0).to(tl.float32)
        columns = weight_00[:, :, None] * value_00 + weight_01[:, :, None] * value_01
        columns += weight_10[:, :, None] * value_10 + weight_11[:, :, None] * value_11
        columns = tl.reshape(columns, (BLOCK_PIXELS, GROUPS * WITHIN))
        inner = first * WITHIN + tl.arange(0, GROUPS * WITHIN)
        weight_ptrs = weight_ptr + weight_address(out[None, :], tap, inner[:, None], 9, CHANNELS)
        weight = tl.load(weight_ptrs, mask=(inner < CHANNELS)[:, None], other=0.0)
        product = multiply(columns.to(weight.dtype), weight, product, PRECISION)
    product += tl.load(bias_ptr + out).to(tl.float32)[None, :]
    address = tensor_address(image, out[None, :], pixel[:, None], CHANNELS, pixels, True)
    tl.store(output_ptr + address, product.to(output_ptr.dtype.element_ty), mask=valid[:, None])


def by_vectors(vector: int) -> Callable[..., Tensor]:
    """The forward pass with so many channels, of several offset groups, as one vector; no backward pass."""

    def function(
        input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, padding: int, mask: Tensor
    ) -> Tensor:
        if torch.is_grad_enabled():
            raise Unavailable("it has no backward pass")
        x = input.contiguous(**LAST)
        batch, channels, height, width = x.shape
        output, groups = torch.empty_like(x), mask.shape[1] // 9
        within = channels // groups
        together = vector // within
        arguments = {
            "input_ptr": x, "offset_ptr": offset, "mask_ptr": mask, "weight_ptr": weight.contiguous(**LAST),
            "bias_ptr": bias, "output_ptr": output, "height": height, "width": width,
            "offset_groups": groups, "steps": 9 * ceil_div(groups, together),
        }  # fmt: skip
        constants = {
            "CHANNELS": channels, "GROUPS": together, "WITHIN": within,
            "PRECISION": precision(x.dtype), "BLOCK_PIXELS": BLOCK_PIXELS,
        }  # fmt: skip
        programs = batch * ceil_div(height * width, BLOCK_PIXELS)
        run(Launch(forward_groups, programs, arguments, constants, num_warps=4), x.device)
        return output

    return function
