"""Triton kernels of the general deformable convolution, an implicit GEMM: forward, and what backward shares.

For segments of 16 channels or more that share offsets and weights. The input is channels_last, so that one
address serves the neighbouring channels of a thread and a corner of a sample is read with 128-bit loads; its
gradient is accumulated in the same layout. The weight is channels_last, too: (Cout, taps, group_channels).
A tile of columns is (BLOCK_PIXELS, BLOCK_CHANNELS) at one tap; it lives in registers only.
"""

import triton
import triton.language as tl

from degmix_kernels.deform_conv.sampling import corners_on_map, locate, tensor_address
from degmix_kernels.product import multiply


@triton.jit
def sample_points(
    offset_ptr,
    image,
    offset_group,
    offset_groups,
    tap,
    pixel,  # (BLOCK_PIXELS,), output pixel
    valid,  # (BLOCK_PIXELS,)
    height,
    width,
    taps,
    kernel_width,
    out_width,
    out_pixels,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    OFFSET_LAST: tl.constexpr,
):
    """Where an offset group samples at one tap: upper left corners and fractions, each (BLOCK_PIXELS,)."""
    channel = 2 * (offset_group * taps + tap)
    channels = 2 * offset_groups * taps
    address_y = tensor_address(image, channel, pixel, channels, out_pixels, OFFSET_LAST)
    address_x = tensor_address(image, channel + 1, pixel, channels, out_pixels, OFFSET_LAST)
    offset_y = tl.load(offset_ptr + address_y, mask=valid, other=0.0).to(tl.float32)
    offset_x = tl.load(offset_ptr + address_x, mask=valid, other=0.0).to(tl.float32)
    base_y = (pixel // out_width * stride_y - padding_y + tap // kernel_width * dilation_y).to(tl.int32)
    base_x = (pixel % out_width * stride_x - padding_x + tap % kernel_width * dilation_x).to(tl.int32)
    return locate(offset_y, offset_x, base_y, base_x, height, width)


@triton.jit
def load_mask(
    mask_ptr, image, offset_group, offset_groups, tap, taps, pixel, valid, out_pixels, MASK_LAST: tl.constexpr
):
    """The modulation of an offset group at one tap, (BLOCK_PIXELS,); the number 1 without a mask."""
    modulation = 1.0
    if mask_ptr is not None:
        channel, channels = offset_group * taps + tap, offset_groups * taps
        address = tensor_address(image, channel, pixel, channels, out_pixels, MASK_LAST)
        modulation = tl.load(mask_ptr + address, mask=valid, other=0.0).to(tl.float32)
    return modulation


@triton.jit
def corner_weights(fraction_y, fraction_x, modulation):
    """Bilinear weights of the four corners, times the mask."""
    upper, lower = (1 - fraction_y) * modulation, fraction_y * modulation
    left = 1 - fraction_x
    return left * upper, fraction_x * upper, left * lower, fraction_x * lower


@triton.jit
def corner_address(image, low_y, low_x, channels, height, width, INDEX_64: tl.constexpr):
    """Address of channel 0 at the upper left corner, (BLOCK_PIXELS,)."""
    if INDEX_64:
        low_y = low_y.to(tl.int64)
    return image * height * width * channels + (low_y * width + low_x) * channels


@triton.jit
def gather(input_ptr, address, row, channels, channel_valid, on_00, on_01, on_10, on_11):
    """The four corner values of each sample and channel, (BLOCK_PIXELS, BLOCK_CHANNELS), 0 off the map."""
    value_00 = tl.load(input_ptr + address, mask=on_00[:, None] & channel_valid, other=0.0)
    value_01 = tl.load(input_ptr + address + channels, mask=on_01[:, None] & channel_valid, other=0.0)
    value_10 = tl.load(input_ptr + address + row, mask=on_10[:, None] & channel_valid, other=0.0)
    value_11 = tl.load(input_ptr + address + row + channels, mask=on_11[:, None] & channel_valid, other=0.0)
    return value_00.to(tl.float32), value_01.to(tl.float32), value_10.to(tl.float32), value_11.to(tl.float32)


@triton.jit
def weight_address(out, tap, channel, taps, group_channels):
    """Address in the channels_last weight; ``out`` counts all out channels, ``channel`` the group's."""
    return (out * taps + tap) * group_channels + channel


@triton.jit
def forward(
    input_ptr,  # (N, H·W, C)
    offset_ptr,  # (N, 2·offset_groups·taps, out_pixels), or with its channels last if OFFSET_LAST
    mask_ptr,  # (N, offset_groups·taps, out_pixels), or with its channels last if MASK_LAST; None
    weight_ptr,  # (Cout, taps, group_channels)
    bias_ptr,  # (Cout,) or None
    output_ptr,  # (N, Cout, out_pixels), or (N, out_pixels, Cout) if OUTPUT_LAST
    segment,  # channels that share offsets and weights
    segments,  # of them in a group
    groups,
    group_channels,
    group_out,
    offset_channels,
    height,
    width,
    taps,
    kernel_width,
    out_width,
    out_pixels,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    OFFSET_LAST: tl.constexpr,
    MASK_LAST: tl.constexpr,
    OUTPUT_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """output = columns · weightᵀ + bias. One program: BLOCK_PIXELS pixels of an image × BLOCK_OUT channels.

    Programs that differ in out channels only follow each other: they gather the same samples, from the cache.
    """
    program = tl.program_id(0)
    out_blocks = tl.cdiv(group_out, BLOCK_OUT)
    pixel_blocks = tl.cdiv(out_pixels, BLOCK_PIXELS)
    out_start = program % out_blocks * BLOCK_OUT
    program //= out_blocks
    group = program % groups
    program //= groups
    pixel_start = program % pixel_blocks * BLOCK_PIXELS
    image = (program // pixel_blocks).to(tl.int64)

    channels = groups * group_channels
    offset_groups = channels // offset_channels
    pixel = pixel_start + tl.arange(0, BLOCK_PIXELS)
    out = out_start + tl.arange(0, BLOCK_OUT)
    if INDEX_64:
        pixel, out = pixel.to(tl.int64), out.to(tl.int64)
    valid = pixel < out_pixels
    out_valid = out < group_out
    out += group * group_out

    product = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), tl.float32)
    for tap in range(0, taps):
        for index in range(0, segments):
            start = index * segment  # within the group
            offset_group = (group * group_channels + start) // offset_channels
            low_y, low_x, fraction_y, fraction_x = sample_points(
                offset_ptr, image, offset_group, offset_groups, tap, pixel, valid, height, width, taps,
                kernel_width, out_width, out_pixels, stride_y, stride_x, padding_y, padding_x,
                dilation_y, dilation_x, OFFSET_LAST,
            )  # fmt: skip
            modulation = load_mask(
                mask_ptr, image, offset_group, offset_groups, tap, taps, pixel, valid, out_pixels, MASK_LAST
            )
            weight_00, weight_01, weight_10, weight_11 = corner_weights(fraction_y, fraction_x, modulation)
            on_00, on_01, on_10, on_11 = corners_on_map(low_y, low_x, valid, height, width)
            corner = corner_address(image, low_y, low_x, channels, height, width, INDEX_64)
            for channel_start in range(0, segment, BLOCK_CHANNELS):
                channel = channel_start + tl.arange(0, BLOCK_CHANNELS)
                channel_valid = channel < segment
                channel += start
                address = corner[:, None] + (group * group_channels + channel)[None, :]
                value_00, value_01, value_10, value_11 = gather(
                    input_ptr, address, width * channels, channels, channel_valid[None, :],
                    on_00, on_01, on_10, on_11,
                )  # fmt: skip
                columns = weight_00[:, None] * value_00 + weight_01[:, None] * value_01
                columns += weight_10[:, None] * value_10 + weight_11[:, None] * value_11
                weight = tl.load(
                    weight_ptr + weight_address(out[None, :], tap, channel[:, None], taps, group_channels),
                    mask=out_valid[None, :] & channel_valid[:, None],
                    other=0.0,
                )  # (BLOCK_CHANNELS, BLOCK_OUT)
                product = multiply(columns.to(weight.dtype), weight, product, PRECISION)

    if bias_ptr is not None:
        product += tl.load(bias_ptr + out, mask=out_valid, other=0.0).to(tl.float32)[None, :]
    address = tensor_address(image, out[None, :], pixel[:, None], groups * group_out, out_pixels, OUTPUT_LAST)
    element = output_ptr.dtype.element_ty
    tl.store(output_ptr + address, product.to(element), mask=valid[:, None] & out_valid[None, :])
