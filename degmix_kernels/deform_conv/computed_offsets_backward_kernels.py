"""Triton kernels of the gradients of ``computed_offsets_kernels``, whose tensors and tiles these are."""

import triton
import triton.language as tl

from degmix_kernels.deform_conv.computed_offsets_kernels import (
    TAPS,
    columns,
    compute_offsets,
    load_patches,
    load_taps,
)
from degmix_kernels.deform_conv.planar_tiles import corner_addresses, gather
from degmix_kernels.deform_conv.sampling import corners_on_map, locate, scatter, tensor_address
from degmix_kernels.epilogue import load_gradient
from degmix_kernels.product import multiply


@triton.jit
def scatter_positions(
    grad_positions_ptr,  # of the image and half
    offset_weight_ptr,
    block,
    row,
    row_valid,
    grad_offsets,  # (rows, pixels)
    pixel,
    valid,
    height,
    width,
    scale,
    FIXED_POINT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what these channels and pixels contribute to the gradient of three maps of their half."""
    taps = load_taps(offset_weight_ptr, block, row, row_valid)
    gradient = tl.zeros((TAPS, pixel.shape[1]), tl.float32)
    gradient = multiply(tl.trans(taps), grad_offsets, gradient, PRECISION)
    tap = tl.arange(0, TAPS)[:, None]
    y = pixel // width + tap % 9 // 3 - 1
    x = pixel % width + tap % 3 - 1
    inside = valid & (tap < 27) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    address = (3 * block + tap // 9) * height * width + pixel + ((tap % 9 // 3 - 1) * width + tap % 3 - 1)
    scatter(grad_positions_ptr, address, gradient, inside, scale, FIXED_POINT)


@triton.jit
def store_taps(partial_ptr, block, row, row_valid, gradient):
    """Store the gradient of a block of taps."""
    tap = tl.arange(0, TAPS)[None, :]
    tl.store(partial_ptr + (row * 3 + block) * TAPS + tap, gradient, mask=row_valid)


@triton.jit
def backward_samples(
    grad_ptr,  # as the output
    pre_ptr,  # as the output: its value before the activation; or None
    input_ptr,
    positions_ptr,  # (N, 18, pixels) fp32
    offset_weight_ptr,  # (2 · channels, 3, TAPS) fp32, zero padded
    constant_offset_ptr,  # (2 · channels, pixels) fp32
    weight_ptr,  # (Cout, channels)
    grad_input_ptr,  # as the input, fp32 or int64 (FIXED_POINT), zeros; None if not wanted
    grad_positions_ptr,  # as the positions, fp32 or int64 (FIXED_POINT), zeros; None if not wanted
    partial_ptr,  # (splits, 2 · channels, 3, TAPS) fp32, of the offset weight; None if not wanted
    grad_constant_ptr,  # as the constant offset; None if not wanted
    scale_ptr,  # two fp32 powers of two, for input and positions, if FIXED_POINT, else None
    batch,
    channels,
    out_channels,
    height,
    width,
    pixels,
    half_steps,  # blocks of channels in a half
    tap_blocks,
    share,  # blocks of pixels per split
    steps,  # share · batch
    out_steps,  # blocks of out channels
    ACTIVATION: tl.constexpr,
    FIXED_POINT: tl.constexpr,
    INPUT_LAST: tl.constexpr,
    OUTPUT_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET_PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Gradients of all but weight and bias. One program: BLOCK_CHANNELS channels, a share of the pixels.

    The gradient of the offsets is a tile in registers. It goes on from there: to the positions under the
    window by atomics, to the offset weight's partial sum, which is kept to the end, and to the constant
    offset's sum over the images, which is kept until the last image.
    """
    program = tl.program_id(0)
    block = program % (2 * half_steps)
    split = program // (2 * half_steps)
    half = block // half_steps
    half_channels = channels // 2
    first_channel = half * half_channels + block % half_steps * BLOCK_CHANNELS
    end_channel = (half + 1) * half_channels
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)[:, None]
    row = 2 * first_channel + tl.arange(0, 2 * BLOCK_CHANNELS)[:, None]
    if INDEX_64:
        channel, row = channel.to(tl.int64), row.to(tl.int64)
    channel_valid, row_valid = channel < end_channel, row < 2 * end_channel
    input_scale, positions_scale = 1.0, 1.0
    if FIXED_POINT:
        input_scale, positions_scale = tl.load(scale_ptr), tl.load(scale_ptr + 1)

    taps_0 = tl.zeros((2 * BLOCK_CHANNELS, TAPS), tl.float32)
    taps_1 = tl.zeros((2 * BLOCK_CHANNELS, TAPS), tl.float32)
    taps_2 = tl.zeros((2 * BLOCK_CHANNELS, TAPS), tl.float32)
    sums = tl.zeros((2 * BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    # One loop over blocks of pixels and the images of each: what only depends on the block is computed again
    # for every image, as the compiler would keep more of it than there are registers.
    for step in tl.range(0, steps, disable_licm=True):
        image = (step % batch).to(tl.int64)
        pixel = (split * share + step // batch) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[None, :]
        base_y, base_x = pixel // width, pixel % width
        if INDEX_64:
            pixel = pixel.to(tl.int64)
        pixel_valid = pixel < pixels  # the last share may end past them
        valid = channel_valid & pixel_valid
        maps = image * 18 * pixels + half * 9 * pixels
        image_ptr = input_ptr + image * channels * pixels
        offset_y, offset_x = compute_offsets(
            positions_ptr + maps, offset_weight_ptr, constant_offset_ptr, first_channel, end_channel,
            pixel, pixel_valid, height, width, tap_blocks, OFFSET_PRECISION, BLOCK_CHANNELS,
        )  # fmt: skip

        gradient = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)  # of the columns
        for out_step in tl.range(0, out_steps, disable_licm=True):
            out = out_step * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            if INDEX_64:
                out = out.to(tl.int64)
            out_valid = out < out_channels
            weight = tl.load(
                weight_ptr + out[None, :] * channels + channel,
                mask=channel_valid & out_valid[None, :],
                other=0.0,
            )
            grad_out = load_gradient(
                grad_ptr + image * out_channels * pixels,
                None if pre_ptr is None else pre_ptr + image * out_channels * pixels,
                None, None,
                tensor_address(0, out[:, None], pixel, out_channels, pixels, OUTPUT_LAST),
                out[:, None], out_valid[:, None], out_valid[:, None] & pixel_valid, ACTIVATION,
            )  # fmt: skip
            gradient = multiply(weight, grad_out, gradient, PRECISION)
        gradient = tl.where(valid, gradient, 0.0)  # the padding may hold 0 · NaN

        low_y, low_x, fraction_y, fraction_x = locate(offset_y, offset_x, base_y, base_x, height, width)
        on_00, on_01, on_10, on_11 = corners_on_map(low_y, low_x, valid, height, width)
        address, next_column, next_row = corner_addresses(
            low_y, low_x, channel, channels, height, width, INPUT_LAST, INDEX_64
        )
        if grad_input_ptr is not None:
            sums_ptr = grad_input_ptr + image * channels * pixels
            upper = (1 - fraction_y) * gradient
            lower = fraction_y * gradient
            right = address + next_column
            scatter(sums_ptr, address, (1 - fraction_x) * upper, on_00, input_scale, FIXED_POINT)
            scatter(sums_ptr, right, fraction_x * upper, on_01, input_scale, FIXED_POINT)
            scatter(sums_ptr, address + next_row, (1 - fraction_x) * lower, on_10, input_scale, FIXED_POINT)
            scatter(sums_ptr, right + next_row, fraction_x * lower, on_11, input_scale, FIXED_POINT)
        value_00, value_01, value_10, value_11 = gather(
            image_ptr, address, next_column, next_row, on_00, on_01, on_10, on_11
        )
        slope_y = (1 - fraction_x) * (value_10 - value_00) + fraction_x * (value_11 - value_01)
        slope_x = (1 - fraction_y) * (value_01 - value_00) + fraction_y * (value_11 - value_10)
        # A coordinate off the map is a constant, whatever gradient arrives there; a NaN is on no side of it.
        off_y = (low_y < -1) & (offset_y == offset_y)
        off_x = (low_x < -1) & (offset_x == offset_x)
        grad_y = tl.where(valid & ~off_y, gradient * slope_y, 0.0)
        grad_x = tl.where(valid & ~off_x, gradient * slope_x, 0.0)
        grad_offsets = tl.reshape(
            tl.permute(tl.join(grad_y, grad_x), (0, 2, 1)), (2 * BLOCK_CHANNELS, BLOCK_PIXELS)
        )
        sums = tl.where(image == 0, grad_offsets, sums + grad_offsets)
        if grad_constant_ptr is not None:
            complete = pixel < tl.where(image == batch - 1, pixels, 0)  # all images are in the sums
            tl.store(grad_constant_ptr + row * pixels + pixel, sums, mask=row_valid & complete)
        if partial_ptr is not None:
            patches = load_patches(positions_ptr + maps, 0, pixel, pixel_valid, height, width)
            taps_0 = multiply(grad_offsets, tl.trans(patches), taps_0, GRADIENT_PRECISION)
            patches = load_patches(positions_ptr + maps, 1, pixel, pixel_valid, height, width)
            taps_1 = multiply(grad_offsets, tl.trans(patches), taps_1, GRADIENT_PRECISION)
            patches = load_patches(positions_ptr + maps, 2, pixel, pixel_valid, height, width)
            taps_2 = multiply(grad_offsets, tl.trans(patches), taps_2, GRADIENT_PRECISION)
        if grad_positions_ptr is not None:
            for tap_block in tl.range(0, tap_blocks, disable_licm=True):
                scatter_positions(
                    grad_positions_ptr + maps, offset_weight_ptr, tap_block, row, row_valid, grad_offsets,
                    pixel, pixel_valid, height, width, positions_scale, FIXED_POINT, GRADIENT_PRECISION,
                )  # fmt: skip

    if partial_ptr is not None:
        partial_ptr += split.to(tl.int64) * 2 * channels * 3 * TAPS
        store_taps(partial_ptr, 0, row, row_valid, taps_0)
        store_taps(partial_ptr, 1, row, row_valid, taps_1)
        store_taps(partial_ptr, 2, row, row_valid, taps_2)


@triton.jit
def backward_weight(
    grad_ptr,  # as the output
    pre_ptr,  # as the output: its value before the activation; or None
    input_ptr,
    positions_ptr,  # (N, 18, pixels) fp32
    offset_weight_ptr,  # (2 · channels, 3, TAPS) fp32, zero padded
    constant_offset_ptr,  # (2 · channels, pixels) fp32
    partial_ptr,  # (splits, Cout, channels) fp32
    bias_partial_ptr,  # (splits, Cout) fp32, or None if not wanted
    batch,
    channels,
    out_channels,
    height,
    width,
    pixels,
    half_steps,  # blocks of channels in a half
    tap_blocks,
    share,  # blocks of pixels per split
    out_blocks,
    ACTIVATION: tl.constexpr,
    INPUT_LAST: tl.constexpr,
    OUTPUT_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    OFFSET_PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """grad_weight = grad_output · columnsᵀ. One program: BLOCK_OUT × BLOCK_CHANNELS, from some of the pixels.

    Offsets are computed and columns sampled again. The programs of the first channels sum up the bias's
    gradient, too.
    """
    program = tl.program_id(0)
    out_block = program % out_blocks
    program //= out_blocks
    block = program % (2 * half_steps)
    split = program // (2 * half_steps)
    half = block // half_steps
    half_channels = channels // 2
    first_channel = half * half_channels + block % half_steps * BLOCK_CHANNELS
    end_channel = (half + 1) * half_channels
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    out = out_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    if INDEX_64:
        channel, out = channel.to(tl.int64), out.to(tl.int64)
    channel_valid = channel < end_channel
    out_valid = out < out_channels

    pixel_blocks = tl.cdiv(pixels, BLOCK_PIXELS)
    gradient = tl.zeros((BLOCK_OUT, BLOCK_CHANNELS), tl.float32)
    grad_bias = tl.zeros((BLOCK_OUT, 1), tl.float32)
    for step in tl.range(0, share, disable_licm=True):
        pixel_block = split * share + step
        image = (pixel_block // pixel_blocks).to(tl.int64)
        end = tl.where(image < batch, pixels, 0)  # the last share may end past the batch
        pixel = pixel_block % pixel_blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[None, :]
        if INDEX_64:
            pixel = pixel.to(tl.int64)
        pixel_valid = pixel < end
        valid = channel_valid[:, None] & pixel_valid
        maps_ptr = positions_ptr + image * 18 * pixels + half * 9 * pixels
        offset_y, offset_x = compute_offsets(
            maps_ptr, offset_weight_ptr, constant_offset_ptr, first_channel, end_channel,
            pixel, pixel_valid, height, width, tap_blocks, OFFSET_PRECISION, BLOCK_CHANNELS,
        )  # fmt: skip
        sampled = columns(
            input_ptr + image * channels * pixels, offset_y, offset_x, channel[:, None], pixel, valid,
            channels, height, width, INPUT_LAST, INDEX_64,
        )  # fmt: skip
        grad_out = load_gradient(
            grad_ptr + image * out_channels * pixels,
            None if pre_ptr is None else pre_ptr + image * out_channels * pixels,
            None, None, tensor_address(0, out, pixel, out_channels, pixels, OUTPUT_LAST),
            out, out_valid, out_valid & pixel_valid, ACTIVATION,
        )  # fmt: skip
        gradient = multiply(grad_out, tl.trans(sampled.to(grad_out.dtype)), gradient, PRECISION)
        if bias_partial_ptr is not None:  # noqa: SIM102 (settled by the compiler)
            if block == 0:
                grad_bias += tl.sum(grad_out.to(tl.float32), axis=1, keep_dims=True)

    partial_ptr += split.to(tl.int64) * out_channels * channels
    tl.store(
        partial_ptr + out * channels + channel[None, :], gradient, mask=out_valid & channel_valid[None, :]
    )
    if bias_partial_ptr is not None:
        bias_partial_ptr += split.to(tl.int64) * out_channels
        tl.store(bias_partial_ptr + out, grad_bias, mask=out < tl.where(block == 0, out_channels, 0))
