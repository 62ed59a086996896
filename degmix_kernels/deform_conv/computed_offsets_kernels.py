"""Triton kernels of DeGMix's operator with its offsets computed on the way: they never reach memory.

An offset is a 3×3 convolution of nine maps plus a constant. The first half of the channels reads maps 0 to
8, the second half maps 9 to 17, so a block of channels lies in one half. The convolution is a matrix product
over 81 taps, index 9·map + 3·row + column, in three blocks of 27, three maps each, padded to TAPS = 32.

Tiles are (channels, pixels), pixels fastest: neighbouring lanes hold neighbouring pixels.
"""

import triton
import triton.language as tl

from degmix_kernels.deform_conv.planar_tiles import corner_addresses, gather
from degmix_kernels.deform_conv.sampling import (
    blend,
    corners_on_map,
    locate,
    multiply,
    scatter,
    tensor_address,
)
from degmix_kernels.epilogue import activate, load_gradient

TAPS = tl.constexpr(32)


@triton.jit
def load_patches(positions_ptr, block, pixel, valid, height, width):
    """Values under the 3×3 windows of the pixels in three maps of a half, (TAPS, pixels), 0 off the map."""
    tap = tl.arange(0, TAPS)[:, None]
    y = pixel // width + tap % 9 // 3 - 1
    x = pixel % width + tap % 3 - 1
    inside = valid & (tap < 27) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    address = (3 * block + tap // 9) * height * width + pixel + ((tap % 9 // 3 - 1) * width + tap % 3 - 1)
    return tl.load(positions_ptr + address, mask=inside, other=0.0)


@triton.jit
def load_taps(offset_weight_ptr, block, row, row_valid):
    """Weights of a block of taps for rows of the convolution, (rows, TAPS)."""
    tap = tl.arange(0, TAPS)[None, :]
    return tl.load(offset_weight_ptr + (row * 3 + block) * TAPS + tap, mask=row_valid, other=0.0)


@triton.jit
def compute_offsets(
    positions_ptr,  # of the image and half
    offset_weight_ptr,
    constant_offset_ptr,
    first_channel,
    end_channel,
    pixel,  # (1, pixels)
    pixel_valid,
    height,
    width,
    tap_blocks,  # 3; not a constant, so that the loop stays one and its operands share registers
    PRECISION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Vertical and horizontal offsets of a block of channels at the pixels, each (channels, pixels).

    One matrix product makes both, so its rows are those of the offset weight. The constants, which may be
    large, come last.
    """
    row = 2 * first_channel + tl.arange(0, 2 * BLOCK_CHANNELS)[:, None]
    row_valid = row < 2 * end_channel
    offsets = tl.zeros((2 * BLOCK_CHANNELS, pixel.shape[1]), tl.float32)
    for block in tl.range(0, tap_blocks, disable_licm=True):
        patches = load_patches(positions_ptr, block, pixel, pixel_valid, height, width)
        taps = load_taps(offset_weight_ptr, block, row, row_valid)
        offsets = multiply(taps, patches, offsets, PRECISION)
    constant = tl.load(
        constant_offset_ptr + row.to(pixel.dtype) * height * width + pixel,
        mask=row_valid & pixel_valid,
        other=0.0,
    )
    offsets = tl.reshape(offsets + constant, (BLOCK_CHANNELS, 2, pixel.shape[1]))
    return tl.split(tl.permute(offsets, (0, 2, 1)))


@triton.jit
def columns(
    input_ptr,  # of the image
    offset_y,
    offset_x,
    channel,
    pixel,
    valid,
    channels,
    height,
    width,
    INPUT_LAST: tl.constexpr,
    INDEX_64: tl.constexpr,
):
    """A tile of samples, 0 where not valid."""
    base_y, base_x = (pixel // width).to(tl.int32), (pixel % width).to(tl.int32)
    low_y, low_x, fraction_y, fraction_x = locate(offset_y, offset_x, base_y, base_x, height, width)
    on_00, on_01, on_10, on_11 = corners_on_map(low_y, low_x, valid, height, width)
    address, column, row = corner_addresses(
        low_y, low_x, channel, channels, height, width, INPUT_LAST, INDEX_64
    )
    value_00, value_01, value_10, value_11 = gather(
        input_ptr, address, column, row, on_00, on_01, on_10, on_11
    )
    result = blend(value_00, value_01, value_10, value_11, fraction_y, fraction_x)
    return tl.where(valid, result, 0.0)  # a NaN position reaches the padding, too


@triton.jit
def forward(
    input_ptr,
    positions_ptr,  # (N, 18, pixels) fp32
    offset_weight_ptr,  # (2 · channels, 3, TAPS) fp32, zero padded
    constant_offset_ptr,  # (2 · channels, pixels) fp32
    weight_ptr,  # (Cout, channels)
    bias_ptr,  # (Cout,) or None
    output_ptr,
    pre_ptr,  # as the output: its value before the activation; or None
    channels,
    out_channels,
    height,
    width,
    pixels,
    out_blocks,
    half_steps,  # blocks of channels in a half
    tap_blocks,
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
    """output = act(weight · columns + bias). One program: BLOCK_PIXELS pixels, BLOCK_OUT out channels.

    Every block of channels loads the patches again, from the cache: kept, they would not fit into registers.
    """
    program = tl.program_id(0)
    out = program % out_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    program //= out_blocks
    pixel_blocks = tl.cdiv(pixels, BLOCK_PIXELS)
    pixel = program % pixel_blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[None, :]
    image = (program // pixel_blocks).to(tl.int64)
    if INDEX_64:
        out, pixel = out.to(tl.int64), pixel.to(tl.int64)
    out_valid = out < out_channels
    pixel_valid = pixel < pixels
    half_channels = channels // 2
    input_ptr += image * channels * pixels
    positions_ptr += image * 18 * pixels

    product = tl.zeros((BLOCK_OUT, BLOCK_PIXELS), tl.float32)
    for half in range(0, 2):
        maps_ptr = positions_ptr + half * 9 * pixels
        for step in range(0, half_steps):
            first_channel = half * half_channels + step * BLOCK_CHANNELS
            end_channel = (half + 1) * half_channels
            channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
            if INDEX_64:
                channel = channel.to(tl.int64)
            channel_valid = channel < end_channel
            weight = tl.load(
                weight_ptr + out * channels + channel[None, :],
                mask=out_valid & channel_valid[None, :],
                other=0.0,
            )
            offset_y, offset_x = compute_offsets(
                maps_ptr, offset_weight_ptr, constant_offset_ptr, first_channel, end_channel,
                pixel, pixel_valid, height, width, tap_blocks, OFFSET_PRECISION, BLOCK_CHANNELS,
            )  # fmt: skip
            sampled = columns(
                input_ptr, offset_y, offset_x, channel[:, None], pixel,
                channel_valid[:, None] & pixel_valid, channels, height, width, INPUT_LAST, INDEX_64,
            )  # fmt: skip
            product = multiply(weight, sampled.to(weight.dtype), product, PRECISION)

    if bias_ptr is not None:
        product += tl.load(bias_ptr + out, mask=out_valid, other=0.0).to(tl.float32)
    stored = out_valid & pixel_valid
    address = tensor_address(0, out, pixel, out_channels, pixels, OUTPUT_LAST)
    output_ptr += image * out_channels * pixels
    if pre_ptr is not None:
        pre_ptr += image * out_channels * pixels
        tl.store(pre_ptr + address, product.to(pre_ptr.dtype.element_ty), mask=stored)
    result = activate(product, ACTIVATION)
    tl.store(output_ptr + address, result.to(output_ptr.dtype.element_ty), mask=stored)


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
        # A coordinate off the map is a constant, whatever gradient arrives there.
        off_y = (low_y < -1) & (fraction_y == fraction_y)
        off_x = (low_x < -1) & (fraction_x == fraction_x)
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
        tl.store(bias_partial_ptr + out, grad_bias, mask=out_valid & (block == 0))
