"""Triton kernels of ``channel_mix``: the product with its epilogue, and the activation's way back.

Tiles are (out channels, pixels), see ``degmix_kernels.product``. Between the two kernels, in training, stand
those of ``batch_norm``, which normalise act(z) as they load z. Arithmetic and sums are fp32.
"""

import triton
import triton.language as tl

from degmix_kernels.epilogue import activate, activate_with_slope, halves_of, store_result
from degmix_kernels.map_kernels import address_of, in_elements, pixels_of_tile, scale_of, vector
from degmix_kernels.product import product_tile, tile_of


@triton.jit
def forward(
    x_ptr,
    weight_ptr,  # (groups·out_channels, inner)
    bias_ptr,  # or None
    pre_ptr,  # z = weight · x + bias, or None
    means_ptr,  # statistics of act(z) in parts, or None
    squares_ptr,
    output_ptr,  # the normalised result, or None
    mean_ptr,  # of the normalisation
    variance_ptr,
    norm_weight_ptr,  # or None
    norm_bias_ptr,  # or None
    residual_ptr,  # laid out as the result, or None
    eps,
    inner,
    out_channels,
    pixels,
    out_blocks,
    pixel_blocks,
    groups,
    ACTIVATION: tl.constexpr,
    INNER_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    PIXEL_UNIT: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    PART: tl.constexpr,
):
    """z and the statistics of act(z), or the result normalised by given statistics, of one tile."""
    inner_units = inner
    inner, out_channels, pixels, image, group, out_start, pixel_start = tile_of(
        inner, out_channels, pixels, out_blocks, pixel_blocks, groups,
        INNER_UNIT, OUT_UNIT, PIXEL_UNIT, INDEX_64, BLOCK_OUT, BLOCK_PIXELS,
    )  # fmt: skip
    channels = groups * inner
    x_ptr += image * channels * pixels + group * inner * (1 if LAST else pixels)
    out = out_start + tl.arange(0, BLOCK_OUT)
    out_valid = out < out_channels
    pixel = pixel_start + tl.arange(0, BLOCK_PIXELS)
    z = product_tile(
        x_ptr, weight_ptr + group * out_channels * inner, out, out_valid, pixel, pixel < pixels,
        inner_units, channels, pixels, INNER_UNIT, LAST, PRECISION, BLOCK_INNER,
    )  # fmt: skip
    out += group * out_channels
    channels = groups * out_channels
    if bias_ptr is not None:
        z += vector(bias_ptr, out, out_valid)[:, None]
    start = image * channels * pixels
    if output_ptr is None:
        mean, squares = store_result(
            z.to(pre_ptr.dtype.element_ty), None, pre_ptr + start, out[:, None], out_valid[:, None],
            pixel_start, channels, pixels, ACTIVATION, LAST, INDEX_64, means_ptr is not None, PART,
        )  # fmt: skip
        if means_ptr is not None:
            part = (image * pixel_blocks + pixel_start // BLOCK_PIXELS) * channels
            tl.store(means_ptr + part + out[:, None], mean, mask=out_valid[:, None])
            tl.store(squares_ptr + part + out[:, None], squares, mask=out_valid[:, None])
    else:
        mean = vector(mean_ptr, out, out_valid)[:, None]
        scale = scale_of(variance_ptr, norm_weight_ptr, eps, out, out_valid)[:, None]
        if norm_bias_ptr is not None:
            shift = vector(norm_bias_ptr, out, out_valid)[:, None]
        else:
            shift = tl.zeros_like(mean)
        store_normalised(
            z, output_ptr, pre_ptr, residual_ptr, mean, scale, shift, out[:, None], out_valid[:, None],
            start, pixel_start, channels, pixels, ACTIVATION, LAST, PART,
        )  # fmt: skip


@triton.jit
def store_normalised(
    z,  # (channels, pixels), fp32
    output_ptr,
    pre_ptr,  # for z, or None
    residual_ptr,  # or None
    mean,  # (channels, 1)
    scale,
    shift,
    channel,  # (channels, 1)
    channel_valid,
    start,  # of the image
    pixel_start,
    channels,
    pixels,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    PART: tl.constexpr,
):
    """Store (act(z) − mean) · scale + shift + residual; in parts as ``store_result``."""
    halves = halves_of(z, PART)
    for outer in tl.static_range(len(halves)):
        quarters = halves_of(halves[outer], PART)
        for inner in tl.static_range(len(quarters)):
            part = quarters[inner]
            before = (outer * len(quarters) + inner) * part.shape[1]
            pixel = pixel_start + before + tl.arange(0, part.shape[1])[None, :]
            valid = channel_valid & (pixel < pixels)
            address = start + (pixel * channels + channel if LAST else channel * pixels + pixel)
            if pre_ptr is not None:
                tl.store(pre_ptr + address, part.to(pre_ptr.dtype.element_ty), mask=valid)
            result = (activate(part, ACTIVATION) - mean) * scale + shift
            if residual_ptr is not None:
                result += tl.load(residual_ptr + address, mask=valid, other=0.0).to(tl.float32)
            tl.store(output_ptr + address, result.to(output_ptr.dtype.element_ty), mask=valid)


@triton.jit
def backward_activation(
    grad_ptr,  # of the result, laid out as z
    pre_ptr,  # z
    mean_ptr,
    variance_ptr,
    norm_weight_ptr,  # or None
    grad_norm_weight_ptr,  # Σ g·x̂ of the whole batch, fp32; None if the statistics are constants
    grad_norm_bias_ptr,  # Σ g of the whole batch, fp32; None with that
    grad_pre_ptr,  # dz, laid out as z
    sums_ptr,  # (parts, channels) fp32: Σ dz over a part, or None
    eps,
    elements,  # behind a statistic
    channels,
    pixels,
    channel_blocks,
    pixel_blocks,
    tiles,
    steps,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    LAST: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """dz = scale · (g − Σg / n − x̂ · Σ(g·x̂) / n) · act'(z) of one part of the tiles, and its sums."""
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    channels, pixels = in_elements(channels, pixels, UNIT, LAST)
    part, channel_block = program // channel_blocks, program % channel_blocks
    row = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    row_valid = row < channels
    channel, channel_valid = row[:, None], row_valid[:, None]
    scale = scale_of(variance_ptr, norm_weight_ptr, eps, row, row_valid)[:, None]
    if grad_norm_bias_ptr is not None:
        mean = vector(mean_ptr, row, row_valid)[:, None]
        constant = vector(grad_norm_bias_ptr, row, row_valid)[:, None] / elements
        deviation = scale_of(variance_ptr, None, eps, row, row_valid)[:, None]
        linear = vector(grad_norm_weight_ptr, row, row_valid)[:, None] / elements * deviation
    total = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for step in range(steps):
        tile = part * steps + step
        image, pixel, pixel_valid = pixels_of_tile(tile, tiles, pixels, pixel_blocks, BLOCK_PIXELS)
        valid = channel_valid & pixel_valid
        address = address_of(image, channel, pixel, channels, pixels, LAST)
        gradient = tl.load(grad_ptr + address, mask=valid, other=0.0).to(tl.float32)
        z = tl.load(pre_ptr + address, mask=valid, other=0.0).to(tl.float32)
        value, slope = activate_with_slope(z, ACTIVATION)
        if grad_norm_bias_ptr is not None:
            gradient -= constant + (value - mean) * linear
        gradient *= scale * slope
        tl.store(grad_pre_ptr + address, gradient.to(grad_pre_ptr.dtype.element_ty), mask=valid)
        if sums_ptr is not None:
            total += tl.where(valid, gradient, 0.0)
    if sums_ptr is not None:
        tl.store(
            sums_ptr + part * channels + channel, tl.sum(total, axis=1, keep_dims=True), mask=channel_valid
        )
