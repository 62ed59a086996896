"""Triton kernels of ``batch_norm``: one pass forward, one backward, and the end of its sums.

Tiles are those of ``map_kernels``. Arithmetic and sums are fp32.
"""

import triton
import triton.language as tl

from degmix_kernels.epilogue import activate
from degmix_kernels.map_kernels import address_of, in_elements, pixels_of_tile, scale_of, tile_of_map, vector


@triton.jit
def forward(
    x_ptr,
    residual_ptr,  # laid out as x, or None
    mean_ptr,
    variance_ptr,
    weight_ptr,  # or None
    bias_ptr,  # or None
    output_ptr,  # laid out as x
    eps,
    channels,
    pixels,
    channel_blocks,
    pixel_blocks,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    LAST: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """(act(x) − mean) · weight / √(variance + eps) + bias + residual of one tile."""
    row, row_valid, _, valid, address = tile_of_map(
        channels, pixels, channel_blocks, pixel_blocks, UNIT, LAST, INDEX_64, BLOCK_CHANNELS, BLOCK_PIXELS
    )

    # Subtracted before anything is scaled: of a large mean only the difference is rounded.
    result = activate(tl.load(x_ptr + address, mask=valid, other=0.0).to(tl.float32), ACTIVATION)
    result -= vector(mean_ptr, row, row_valid)[:, None]
    result *= scale_of(variance_ptr, weight_ptr, eps, row, row_valid)[:, None]
    if bias_ptr is not None:
        result += vector(bias_ptr, row, row_valid)[:, None]
    if residual_ptr is not None:
        result += tl.load(residual_ptr + address, mask=valid, other=0.0).to(tl.float32)
    tl.store(output_ptr + address, result.to(output_ptr.dtype.element_ty), mask=valid)


@triton.jit
def backward(
    grad_ptr,  # laid out as x
    x_ptr,  # or None: without it Σ g alone is summed
    mean_ptr,
    variance_ptr,
    weight_ptr,  # or None
    grad_x_ptr,  # laid out as x, or None
    sums_ptr,  # (2, parts, channels) fp32, or None
    eps,
    channels,
    pixels,
    channel_blocks,
    pixel_blocks,
    tiles,  # of all images, for one block of channels
    steps,  # tiles of a program
    parts,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    LAST: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """The gradient of act(x), and Σ g and Σ g·(act(x) − mean) per channel, over one part of the tiles."""
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    channels, pixels = in_elements(channels, pixels, UNIT, LAST)
    part, channel_block = program // channel_blocks, program % channel_blocks
    row = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    row_valid = row < channels
    channel, channel_valid = row[:, None], row_valid[:, None]
    if grad_x_ptr is not None:
        scale = scale_of(variance_ptr, weight_ptr, eps, row, row_valid)[:, None]
    if x_ptr is not None:
        mean = vector(mean_ptr, row, row_valid)[:, None]
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    product = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for step in range(steps):
        tile = part * steps + step
        image, pixel, pixel_valid = pixels_of_tile(tile, tiles, pixels, pixel_blocks, BLOCK_PIXELS)
        valid = channel_valid & pixel_valid
        address = address_of(image, channel, pixel, channels, pixels, LAST)
        gradient = tl.load(grad_ptr + address, mask=valid, other=0.0).to(tl.float32)
        if sums_ptr is not None:
            total += gradient
        if x_ptr is not None:
            value = tl.load(x_ptr + address, mask=valid, other=0.0).to(tl.float32)
            product += gradient * (activate(value, ACTIVATION) - mean)
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + address, (gradient * scale).to(grad_x_ptr.dtype.element_ty), mask=valid)
    if sums_ptr is not None:
        sums_ptr += part * channels + channel
        tl.store(sums_ptr, tl.sum(total, axis=1, keep_dims=True), mask=channel_valid)
        if x_ptr is not None:
            sums_ptr += parts * channels
            tl.store(sums_ptr, tl.sum(product, axis=1, keep_dims=True), mask=channel_valid)


@triton.jit
def finish(
    sums_ptr,  # (2, parts, channels)
    variance_ptr,
    weight_ptr,  # or None
    grad_mean_ptr,  # each fp32, or None
    grad_variance_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    eps,
    parts,
    channels,
    INDEX_64: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Gradients of the vectors from the sums, for one block of channels."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel_valid = channel < channels
    total = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), tl.float32)
    product = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)[:, None]
        valid = (part < parts) & channel_valid[None, :]
        total += tl.load(sums_ptr + part * channels + channel[None, :], mask=valid, other=0.0)
        if (grad_variance_ptr is not None) or (grad_weight_ptr is not None):
            product += tl.load(sums_ptr + (parts + part) * channels + channel[None, :], mask=valid, other=0.0)
    total = tl.sum(total, axis=0)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + channel, total, mask=channel_valid)
    scale = scale_of(variance_ptr, weight_ptr, eps, channel, channel_valid)
    if grad_mean_ptr is not None:
        tl.store(grad_mean_ptr + channel, -scale * total, mask=channel_valid)
    deviation = tl.rsqrt(vector(variance_ptr, channel, channel_valid) + eps)
    product = tl.sum(product, axis=0) * deviation  # Σ g·x̂
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + channel, product, mask=channel_valid)
    if grad_variance_ptr is not None:
        tl.store(grad_variance_ptr + channel, -0.5 * scale * deviation * product, mask=channel_valid)
