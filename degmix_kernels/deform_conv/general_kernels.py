"""Triton kernels of the general deformable convolution, an implicit GEMM: forward, then backward.

For segments of 16 channels or more that share offsets and weights. The input is channels_last, so that one
address serves the neighbouring channels of a thread and a corner of a sample is read with 128-bit loads; its
gradient is accumulated in the same layout. The weight is channels_last, too: (Cout, taps, group_channels).
A tile of columns is (BLOCK_PIXELS, BLOCK_CHANNELS) at one tap; it lives in registers only.
"""

import triton
import triton.language as tl

from degmix_kernels.deform_conv.sampling import corners_on_map, locate, multiply, scatter, tensor_address


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
    mask_ptr,  # (N, offset_groups·taps, out_pixels), or likewise if MASK_LAST; None
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
