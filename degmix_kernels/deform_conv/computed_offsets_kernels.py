"""Triton kernels of DeGMix's operator with its offsets computed on the way: they never reach memory.

An offset is a 3×3 convolution of nine maps plus a constant. The first half of the channels reads maps 0 to
8, the second half maps 9 to 17, so a block of channels lies in one half. The convolution is a matrix product
over 81 taps, index 9·map + 3·row + column, in three blocks of 27, three maps each, padded to TAPS = 32.

Tiles are (channels, pixels), pixels fastest: neighbouring lanes hold neighbouring pixels.
"""

import triton
import triton.language as tl

from degmix_kernels.deform_conv.planar_tiles import corner_addresses, gather
from degmix_kernels.deform_conv.sampling import blend, corners_on_map, locate, tensor_address
from degmix_kernels.epilogue import activate
from degmix_kernels.product import multiply

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
