"""Triton kernels of ``linear_norm``: the product normalised where it is computed, and the way back.

Tiles are (all out channels, pixels), see ``degmix_kernels.product``. Arithmetic and sums are fp32.
"""

import triton
import triton.language as tl

from degmix_kernels.map_kernels import in_elements, pixels_of_tile, vector
from degmix_kernels.product import product_tile, tile_of


@triton.jit
def forward(
    x_ptr,
    weight_ptr,  # (out_channels, inner)
    bias_ptr,  # or None
    norm_weight_ptr,
    norm_bias_ptr,
    addend_ptr,  # laid out as the result, or None
    residual_ptr,  # laid out as the result, or None
    output_ptr,
    normed_ptr,  # x̂, laid out as the result, or None
    deviation_ptr,  # 1 / √(variance + eps) of every pixel, fp32, or None
    eps,
    inner,
    out_channels,
    pixels,
    out_blocks,
    pixel_blocks,
    groups,
    BLOCKS: tl.constexpr,  # of parameters, one for each image, or 1 for all of them
    INNER_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    PIXEL_UNIT: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """LayerNorm(weight · x + bias + addend) + residual of one block of pixels."""
    inner_units = inner
    inner, out_channels, pixels, image, _, _, pixel_start = tile_of(
        inner, out_channels, pixels, out_blocks, pixel_blocks, groups,
        INNER_UNIT, OUT_UNIT, PIXEL_UNIT, INDEX_64, BLOCK_OUT, BLOCK_PIXELS,
    )  # fmt: skip
    out = tl.arange(0, BLOCK_OUT)
    out_valid = out < out_channels
    if BLOCKS > 1:
        weight_ptr += image * out_channels * inner
        norm_weight_ptr += image * out_channels
        norm_bias_ptr += image * out_channels
        if bias_ptr is not None:
            bias_ptr += image * out_channels
    pixel = pixel_start + tl.arange(0, BLOCK_PIXELS)
    pixel_valid = pixel < pixels
    z = product_tile(
        x_ptr + image * inner * pixels, weight_ptr, out, out_valid, pixel, pixel_valid,
        inner_units, inner, pixels, INNER_UNIT, LAST, PRECISION, BLOCK_INNER,
    )  # fmt: skip
    channel, valid = out[:, None], out_valid[:, None] & pixel_valid[None, :]
    if LAST:
        address = (image * pixels + pixel[None, :]) * out_channels + channel
    else:
        address = (image * out_channels + channel) * pixels + pixel[None, :]
    if bias_ptr is not None:
        z += vector(bias_ptr, out, out_valid)[:, None]
    if addend_ptr is not None:
        z += tl.load(addend_ptr + address, mask=valid, other=0.0).to(tl.float32)
    mean = tl.sum(tl.where(out_valid[:, None], z, 0.0), axis=0, keep_dims=True) / out_channels
    z = tl.where(out_valid[:, None], z - mean, 0.0)
    deviation = tl.rsqrt(tl.sum(z * z, axis=0, keep_dims=True) / out_channels + eps)
    z *= deviation
    if normed_ptr is not None:
        tl.store(normed_ptr + address, z.to(normed_ptr.dtype.element_ty), mask=valid)
        row = image * pixels + pixel[None, :]
        tl.store(deviation_ptr + row, deviation, mask=pixel_valid[None, :])
    z = z * vector(norm_weight_ptr, out, out_valid)[:, None] + vector(norm_bias_ptr, out, out_valid)[:, None]
    if residual_ptr is not None:
        z += tl.load(residual_ptr + address, mask=valid, other=0.0).to(tl.float32)
    tl.store(output_ptr + address, z.to(output_ptr.dtype.element_ty), mask=valid)


@triton.jit
def backward(
    grad_ptr,  # of the result
    normed_ptr,  # x̂, laid out as the gradient
    deviation_ptr,  # (images · pixels,)
    norm_weight_ptr,
    grad_pre_ptr,  # dz, laid out as the gradient, or None
    sums_ptr,  # (3, blocks, parts, channels) fp32: Σ g·x̂, Σ g, Σ dz
    channels,
    pixels,
    pixel_blocks,
    tiles,  # of one block
    steps,
    parts,  # of one block
    BLOCKS: tl.constexpr,  # of parameters, one for each image, or 1 for all of them
    UNIT: tl.constexpr,
    LAST: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """dz = (h − mean h − x̂ · mean(h·x̂)) / √(variance + eps), h = norm_weight · g, of a part of the tiles."""
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    block, part = 0, program
    if BLOCKS > 1:
        block, part = program // parts, program % parts
    channels, pixels = in_elements(channels, pixels, UNIT, LAST)
    row = tl.arange(0, BLOCK_CHANNELS)
    row_valid = row < channels
    channel, channel_valid = row[:, None], row_valid[:, None]
    weight = vector(norm_weight_ptr + block * channels, row, row_valid)[:, None]
    scales = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    shifts = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    biases = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for step in range(steps):
        tile = part * steps + step
        image, pixel, pixel_valid = pixels_of_tile(tile, tiles, pixels, pixel_blocks, BLOCK_PIXELS)
        image = block + image
        valid = channel_valid & pixel_valid
        if LAST:
            address = (image * pixels + pixel) * channels + channel
        else:
            address = (image * channels + channel) * pixels + pixel
        gradient = tl.load(grad_ptr + address, mask=valid, other=0.0).to(tl.float32)
        normed = tl.load(normed_ptr + address, mask=valid, other=0.0).to(tl.float32)
        product = gradient * normed
        scales += product
        shifts += gradient
        if grad_pre_ptr is not None:
            deviation = tl.load(deviation_ptr + image * pixels + pixel, mask=pixel_valid, other=0.0)
            mean = tl.sum(gradient * weight, axis=0, keep_dims=True) / channels
            slope = tl.sum(product * weight, axis=0, keep_dims=True) / channels
            gradient = tl.where(channel_valid, (gradient * weight - mean - normed * slope) * deviation, 0.0)
            tl.store(grad_pre_ptr + address, gradient.to(grad_pre_ptr.dtype.element_ty), mask=valid)
            biases += gradient
    sums_ptr += program * channels + channel
    every = BLOCKS * parts * channels
    tl.store(sums_ptr, tl.sum(scales, axis=1, keep_dims=True), mask=channel_valid)
    tl.store(sums_ptr + every, tl.sum(shifts, axis=1, keep_dims=True), mask=channel_valid)
    if grad_pre_ptr is not None:
        tl.store(sums_ptr + 2 * every, tl.sum(biases, axis=1, keep_dims=True), mask=channel_valid)
