"""Triton kernels of the general deformable convolution's gradients; tensors as in ``kernels``."""

import triton
import triton.language as tl

from degmix_kernels.deform_conv.general.kernels import (
    corner_address,
    corner_weights,
    gather,
    load_mask,
    sample_points,
    weight_address,
)
from degmix_kernels.deform_conv.sampling import corners_on_map, is_number, scatter, tensor_address
from degmix_kernels.product import multiply


@triton.jit
def load_gradient(
    grad_output_ptr, image, out, out_valid, pixel, valid, out_channels, out_pixels, OUTPUT_LAST: tl.constexpr
):
    """A tile of the output's gradient, (BLOCK_PIXELS, BLOCK_OUT)."""
    address = tensor_address(image, out[None, :], pixel[:, None], out_channels, out_pixels, OUTPUT_LAST)
    return tl.load(grad_output_ptr + address, mask=valid[:, None] & out_valid[None, :], other=0.0)


@triton.jit
def backward_samples(
    grad_output_ptr,  # (N, Cout, out_pixels), or (N, out_pixels, Cout) if OUTPUT_LAST
    input_ptr,  # (N, H·W, C)
    offset_ptr,  # as in forward
    mask_ptr,  # as in forward
    weight_ptr,  # (Cout, taps, group_channels)
    grad_input_ptr,  # (N, H·W, C), fp32 or int64 (FIXED_POINT), zeros; None if not wanted
    grad_offset_ptr,  # as offset, None if not wanted
    grad_mask_ptr,  # as mask, None if not wanted
    scale_ptr,  # one fp32, a power of two, if FIXED_POINT, else None
    segment,  # channels that share offsets and weights
    segments,  # of them in an offset group
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
    FIXED_POINT: tl.constexpr,
    HELD: tl.constexpr,  # one group, and BLOCK_OUT holds its out channels: the gradient is read once
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Gradients of input, offset and mask. One program: an offset group at BLOCK_PIXELS pixels, all taps.

    It sees every channel behind an offset, so offset and mask gradients are plain stores.
    """
    program = tl.program_id(0)
    channels = groups * group_channels
    offset_groups = channels // offset_channels
    pixel_blocks = tl.cdiv(out_pixels, BLOCK_PIXELS)
    offset_group = program % offset_groups
    program //= offset_groups
    pixel_start = program % pixel_blocks * BLOCK_PIXELS
    image = (program // pixel_blocks).to(tl.int64)

    pixel = pixel_start + tl.arange(0, BLOCK_PIXELS)
    if INDEX_64:
        pixel = pixel.to(tl.int64)
    valid = pixel < out_pixels
    out_channels = groups * group_out
    out = tl.arange(0, BLOCK_OUT)
    if INDEX_64:
        out = out.to(tl.int64)
    if HELD:
        held = load_gradient(
            grad_output_ptr, image, out, out < group_out, pixel, valid, out_channels, out_pixels, OUTPUT_LAST
        )
    scale = 1.0
    if FIXED_POINT:
        scale = tl.load(scale_ptr)

    for tap in range(0, taps):
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
        # A sample is v00 + fy·dy + fx·dx + fy·fx·dyx. Summed over channels, times the column gradient:
        sum_value = tl.zeros((BLOCK_PIXELS,), tl.float32)
        sum_dy = tl.zeros((BLOCK_PIXELS,), tl.float32)
        sum_dx = tl.zeros((BLOCK_PIXELS,), tl.float32)
        sum_dyx = tl.zeros((BLOCK_PIXELS,), tl.float32)
        for index in range(0, segments):
            start = offset_group * offset_channels + index * segment  # within all channels
            group = start // group_channels
            for channel_start in range(0, segment, BLOCK_CHANNELS):
                channel = channel_start + tl.arange(0, BLOCK_CHANNELS)
                channel_valid = channel < segment
                channel += start
                gradient = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)  # of the columns
                for out_start in range(0, group_out, BLOCK_OUT):
                    out_valid = out_start + out < group_out
                    weight = tl.load(
                        weight_ptr
                        + weight_address(
                            (group * group_out + out_start + out)[:, None], tap,
                            (channel - group * group_channels)[None, :], taps, group_channels,
                        ),
                        mask=out_valid[:, None] & channel_valid[None, :],
                        other=0.0,
                    )  # (BLOCK_OUT, BLOCK_CHANNELS)  # fmt: skip
                    if HELD:
                        gradient = multiply(held, weight, gradient, PRECISION)
                    else:
                        grad_output = load_gradient(
                            grad_output_ptr, image, group * group_out + out_start + out, out_valid, pixel,
                            valid, out_channels, out_pixels, OUTPUT_LAST,
                        )  # fmt: skip
                        gradient = multiply(grad_output, weight, gradient, PRECISION)
                address = corner[:, None] + channel[None, :]
                if (grad_offset_ptr is not None) or (grad_mask_ptr is not None):
                    value_00, value_01, value_10, value_11 = gather(
                        input_ptr, address, width * channels, channels, channel_valid[None, :],
                        on_00, on_01, on_10, on_11,
                    )  # fmt: skip
                    dy, dx = value_10 - value_00, value_01 - value_00
                    sum_dy += tl.sum(gradient * dy, 1)
                    sum_dx += tl.sum(gradient * dx, 1)
                    sum_dyx += tl.sum(gradient * (value_11 - value_01 - dy), 1)
                    if grad_mask_ptr is not None:
                        sum_value += tl.sum(gradient * value_00, 1)
                if grad_input_ptr is not None:
                    below = address + width * channels
                    lanes = channel_valid[None, :]
                    scatter(grad_input_ptr, address, weight_00[:, None] * gradient,
                            on_00[:, None] & lanes, scale, FIXED_POINT)  # fmt: skip
                    scatter(grad_input_ptr, address + channels, weight_01[:, None] * gradient,
                            on_01[:, None] & lanes, scale, FIXED_POINT)  # fmt: skip
                    scatter(grad_input_ptr, below, weight_10[:, None] * gradient,
                            on_10[:, None] & lanes, scale, FIXED_POINT)  # fmt: skip
                    scatter(grad_input_ptr, below + channels, weight_11[:, None] * gradient,
                            on_11[:, None] & lanes, scale, FIXED_POINT)  # fmt: skip
        if grad_offset_ptr is not None:
            element = grad_offset_ptr.dtype.element_ty
            channel_y = 2 * (offset_group * taps + tap)
            offset_channels_all = 2 * offset_groups * taps
            address_y = tensor_address(image, channel_y, pixel, offset_channels_all, out_pixels, OFFSET_LAST)
            address_x = tensor_address(
                image, channel_y + 1, pixel, offset_channels_all, out_pixels, OFFSET_LAST
            )
            grad_y = modulation * (sum_dy + fraction_x * sum_dyx)
            grad_x = modulation * (sum_dx + fraction_y * sum_dyx)
            # A coordinate off the map is a constant, whatever gradient arrives there.
            offset_y = tl.load(offset_ptr + address_y, mask=valid, other=0.0)
            offset_x = tl.load(offset_ptr + address_x, mask=valid, other=0.0)
            grad_y = tl.where((low_y < -1) & is_number(offset_y), 0.0, grad_y)
            grad_x = tl.where((low_x < -1) & is_number(offset_x), 0.0, grad_x)
            tl.store(grad_offset_ptr + address_y, grad_y.to(element), mask=valid)
            tl.store(grad_offset_ptr + address_x, grad_x.to(element), mask=valid)
        if grad_mask_ptr is not None:
            address_mask = tensor_address(
                image, offset_group * taps + tap, pixel, offset_groups * taps, out_pixels, MASK_LAST
            )
            grad_mask = sum_value + fraction_y * sum_dy + fraction_x * (sum_dx + fraction_y * sum_dyx)
            tl.store(grad_mask_ptr + address_mask, grad_mask.to(grad_mask_ptr.dtype.element_ty), mask=valid)


@triton.jit
def backward_weight(
    grad_output_ptr,  # (N, Cout, out_pixels), or (N, out_pixels, Cout) if OUTPUT_LAST
    input_ptr,  # (N, H·W, C)
    offset_ptr,  # as in forward
    mask_ptr,  # as in forward
    partial_ptr,  # (splits, Cout, taps, group_channels), fp32
    batch,
    share,  # pixel blocks of one split
    segment,  # channels that share offsets and weights
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
    """Partial sums of the weight gradient. One program: BLOCK_OUT × BLOCK_CHANNELS at one tap, one split.

    Programs of the same split follow each other: they read the same pixels of the gradient.
    """
    program = tl.program_id(0)
    out_blocks = tl.cdiv(group_out, BLOCK_OUT)
    segment_blocks = tl.cdiv(segment, BLOCK_CHANNELS)
    out_start = program % out_blocks * BLOCK_OUT
    program //= out_blocks
    tap = program % taps
    program //= taps
    channel_start = program % segment_blocks * BLOCK_CHANNELS
    program //= segment_blocks
    segments = groups * group_channels // segment
    start = program % segments * segment  # within all channels
    split = program // segments

    channels = groups * group_channels
    offset_groups = channels // offset_channels
    group = start // group_channels
    offset_group = start // offset_channels
    out = out_start + tl.arange(0, BLOCK_OUT)
    channel = channel_start + tl.arange(0, BLOCK_CHANNELS)
    if INDEX_64:
        out = out.to(tl.int64)
    out_valid = out < group_out
    channel_valid = channel < segment
    out += group * group_out
    channel += start

    pixel_blocks = tl.cdiv(out_pixels, BLOCK_PIXELS)
    gradient = tl.zeros((BLOCK_OUT, BLOCK_CHANNELS), tl.float32)
    for step in range(0, share):
        pixel_block = split * share + step
        image = (pixel_block // pixel_blocks).to(tl.int64)
        pixel = pixel_block % pixel_blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        if INDEX_64:
            pixel = pixel.to(tl.int64)
        valid = pixel < tl.where(image < batch, out_pixels, 0)  # the last share may end past the batch
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
        value_00, value_01, value_10, value_11 = gather(
            input_ptr, corner[:, None] + channel[None, :], width * channels, channels, channel_valid[None, :],
            on_00, on_01, on_10, on_11,
        )  # fmt: skip
        columns = weight_00[:, None] * value_00 + weight_01[:, None] * value_01
        columns += weight_10[:, None] * value_10 + weight_11[:, None] * value_11
        grad_output = load_gradient(
            grad_output_ptr, image, out, out_valid, pixel, valid, groups * group_out, out_pixels, OUTPUT_LAST
        )
        columns = columns.to(grad_output.dtype)
        gradient = multiply(tl.trans(grad_output), columns, gradient, PRECISION)

    partial = split.to(tl.int64) * groups * group_out * taps * group_channels
    partial += weight_address(
        out[:, None], tap, (channel - group * group_channels)[None, :], taps, group_channels
    )
    tl.store(partial_ptr + partial, gradient, mask=out_valid[:, None] & channel_valid[None, :])
