"""The backward pass of ``deform_mix``: dz once, a product, a scatter over planes, a product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.gpu.decide.common import FP32, product, with_backward
from degmix_kernels.deform_conv.mix_op import mix_op
from degmix_kernels.deform_conv.sampling import corners_on_map, is_number, locate
from degmix_kernels.launch import Launch, run
from degmix_kernels.maps import ceil_div

BLOCK = 256  # pixels of a program


@triton.jit
def add_pair(copies_ptr, pixel, left, right, on_left, on_right, size):
    """Add to a pixel and its right neighbour in a plane of two copies, in one aligned piece of 64 bits.

    Pixel p is at p in the first copy and at p + 1 of the second, size + p + 1: pairs of even p are aligned in
    the first, those of odd p, -1 among them, in the second. Beside the map a zero is added.
    """
    odd = pixel & 1
    at = tl.multiple_of(odd * size + pixel + odd, 2)
    pair = tl.join(tl.where(on_left, left, 0.0), tl.where(on_right, right, 0.0))
    address = at[:, None] + tl.arange(0, 2)[None, :]
    tl.atomic_add(copies_ptr + address, pair, mask=(on_left | on_right)[:, None], sem="relaxed")


@triton.jit
def samples_backward(
    dcol_ptr,  # (planes, pixels), the samples' gradients: Wᵀ · dz
    input_ptr,  # (planes, pixels)
    offset_ptr,  # (planes, 2, pixels)
    grad_input_ptr,  # as input, fp32, added to; with PAIRS (planes, 2, size)
    grad_offset_ptr,  # as offset
    col_ptr,  # as input, for the samples, which the weight's gradient needs
    height,
    width,
    pixels,
    blocks,
    size,  # of a copy, with PAIRS
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,  # two copies of the input's gradient, see add_pair
):
    """Gradients of input and offset. One program: BLOCK pixels of a plane."""
    program = tl.program_id(0)
    plane = (program // blocks).to(tl.int64)
    pixel = program % blocks * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < pixels
    at = plane * pixels + pixel
    offset_at = at + plane * pixels
    offset_y = tl.load(offset_ptr + offset_at, mask=valid, other=0.0)
    offset_x = tl.load(offset_ptr + offset_at + pixels, mask=valid, other=0.0)
    gradient = tl.load(dcol_ptr + at, mask=valid, other=0.0).to(tl.float32)
    low_y, low_x, fraction_y, fraction_x = locate(
        offset_y, offset_x, pixel // width, pixel % width, height, width
    )
    on_00, on_01, on_10, on_11 = corners_on_map(low_y, low_x, valid, height, width)
    corner = plane * pixels + low_y * width + low_x
    value_00 = tl.load(input_ptr + corner, mask=on_00, other=0.0).to(tl.float32)
    value_01 = tl.load(input_ptr + corner + 1, mask=on_01, other=0.0).to(tl.float32)
    value_10 = tl.load(input_ptr + corner + width, mask=on_10, other=0.0).to(tl.float32)
    value_11 = tl.load(input_ptr + corner + width + 1, mask=on_11, other=0.0).to(tl.float32)
    upper_dx, lower_dx = value_01 - value_00, value_11 - value_10
    upper, lower = value_00 + fraction_x * upper_dx, value_10 + fraction_x * lower_dx
    col = upper + fraction_y * (lower - upper)
    tl.store(col_ptr + at, col.to(col_ptr.dtype.element_ty), mask=valid)
    grad_y = gradient * (lower - upper)
    grad_x = gradient * (upper_dx + fraction_y * (lower_dx - upper_dx))
    # A coordinate off the map is a constant, whatever gradient arrives there.
    grad_y = tl.where((low_y < -1) & is_number(offset_y), 0.0, grad_y)
    grad_x = tl.where((low_x < -1) & is_number(offset_x), 0.0, grad_x)
    tl.store(grad_offset_ptr + offset_at, grad_y, mask=valid)
    tl.store(grad_offset_ptr + offset_at + pixels, grad_x, mask=valid)
    grad_lower = fraction_y * gradient
    grad_upper = gradient - grad_lower
    upper_right, lower_right = fraction_x * grad_upper, fraction_x * grad_lower
    upper_left, lower_left = grad_upper - upper_right, grad_lower - lower_right
    if PAIRS:
        copies_ptr, pixel = grad_input_ptr + plane * 2 * size, low_y * width + low_x
        add_pair(copies_ptr, pixel, upper_left, upper_right, on_00, on_01, size)
        add_pair(copies_ptr, pixel + width, lower_left, lower_right, on_10, on_11, size)
    else:
        tl.atomic_add(grad_input_ptr + corner, upper_left, mask=on_00, sem="relaxed")
        tl.atomic_add(grad_input_ptr + corner + 1, upper_right, mask=on_01, sem="relaxed")
        tl.atomic_add(grad_input_ptr + corner + width, lower_left, mask=on_10, sem="relaxed")
        tl.atomic_add(grad_input_ptr + corner + width + 1, lower_right, mask=on_11, sem="relaxed")


def redesigned(pairs: bool) -> Callable[..., Tensor]:
    """``deform_mix`` with this backward pass; the input's gradient may be added to in pairs of pixels."""

    def forward(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        output, _, _, pre = mix_op(mix_op.call(x, offset, weight, bias, "gelu", False, True, False))
        return output, (x, offset, weight, pre)

    def backward(grad: Tensor, x: Tensor, offset: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, ...]:
        batch, channels, height, width = x.shape
        pixels, blocks = height * width, ceil_div(height * width, BLOCK)
        dz = torch.ops.aten.gelu_backward(grad, pre)
        dcol = weight[:, :, 0, 0].mT.expand(batch, -1, -1) @ dz.flatten(2)
        # A copy has room for a pixel more at both ends, and a multiple of 16, which Triton knows is even.
        size = ceil_div(pixels + 2, 16) * 16
        sums = x.new_zeros(*((batch, channels, 2, size) if pairs else x.shape), dtype=FP32)
        grad_offset, col = torch.empty_like(offset), torch.empty_like(x)
        arguments = {
            "dcol_ptr": dcol, "input_ptr": x, "offset_ptr": offset, "grad_input_ptr": sums,
            "grad_offset_ptr": grad_offset, "col_ptr": col, "height": height, "width": width,
            "pixels": pixels, "blocks": blocks, "size": size,
        }  # fmt: skip
        constants = {"BLOCK": BLOCK, "PAIRS": pairs}
        run(Launch(samples_backward, batch * channels * blocks, arguments, constants), x.device)
        if pairs:
            sums = (sums[:, :, 0, :pixels] + sums[:, :, 1, 1 : 1 + pixels]).view_as(x)
        grad_weight = product(dz.flatten(2), col.flatten(2).mT).sum(0).to(weight.dtype).view_as(weight)
        return sums.to(x.dtype), grad_offset, grad_weight, dz.sum((0, 2, 3))

    of_tensors = with_backward(forward, backward)
    return lambda x, offset, weight, bias: of_tensors(x, offset, weight, bias)
