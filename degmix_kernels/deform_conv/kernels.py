"""Triton kernels of the per-channel 1×1 deformable convolution: forward, then backward.

Every tensor is planar, (N, channels, pixels) and contiguous: neighbouring lanes hold neighbouring pixels and
so read neighbouring addresses. Only the output and its gradient may be channels_last. Coordinates, blends and
sums are fp32; only the operands of matrix products are rounded to the input's dtype.
"""

import triton
import triton.language as tl

from degmix_kernels.deform_conv.sampling import blend, multiply, scatter, split_coordinate


@triton.jit
def locate(
    offset_ptr,
    image,
    channel,  # (BLOCK_CHANNELS, 1), number within all channels
    pixel,  # (1, BLOCK_PIXELS), output pixel
    valid,  # (BLOCK_CHANNELS, BLOCK_PIXELS)
    channels,
    height,
    width,
    out_width,
    out_pixels,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
):
    """Read the offsets of a tile: upper left corner and fractions, each (BLOCK_CHANNELS, BLOCK_PIXELS)."""
    address = offset_ptr + image * 2 * channels * out_pixels + 2 * channel * out_pixels + pixel
    offset_y = tl.load(address, mask=valid, other=0.0).to(tl.float32)
    offset_x = tl.load(address + out_pixels, mask=valid, other=0.0).to(tl.float32)
    base_y = (pixel // out_width * stride_y - padding_y).to(tl.int32)
    base_x = (pixel % out_width * stride_x - padding_x).to(tl.int32)
    low_y, fraction_y = split_coordinate(offset_y, base_y, height)
    low_x, fraction_x = split_coordinate(offset_x, base_x, width)
    undefined = (fraction_y + fraction_x) * 0  # 0, or NaN: a NaN in either spoils both
    return low_y, low_x, fraction_y + undefined, fraction_x + undefined


@triton.jit
def corner_addresses(image, channel, low_y, low_x, valid, channels, height, width, INDEX_64: tl.constexpr):
    """Address of the upper left corner, and which of the four corners lie on the map.

    Rows and columns run from -2 to size - 1, so two comparisons per axis settle all bounds.
    """
    if INDEX_64:
        low_y = low_y.to(tl.int64)
    address = image * channels * height * width + channel * height * width + low_y * width + low_x
    upper = valid & (low_y >= 0)
    lower = valid & (low_y >= -1) & (low_y < height - 1)
    left = low_x >= 0
    right = (low_x >= -1) & (low_x < width - 1)
    return address, upper & left, upper & right, lower & left, lower & right


@triton.jit
def gather(input_ptr, address, width, valid_00, valid_01, valid_10, valid_11):
    """The four corner values of each sample, 0 off the map."""
    value_00 = tl.load(input_ptr + address, mask=valid_00, other=0.0).to(tl.float32)
    value_01 = tl.load(input_ptr + address + 1, mask=valid_01, other=0.0).to(tl.float32)
    value_10 = tl.load(input_ptr + address + width, mask=valid_10, other=0.0).to(tl.float32)
    value_11 = tl.load(input_ptr + address + width + 1, mask=valid_11, other=0.0).to(tl.float32)
    return value_00, value_01, value_10, value_11


@triton.jit
def sample(
    input_ptr,
    offset_ptr,
    mask_ptr,
    image,
    channel,
    pixel,
    valid,
    channels,
    height,
    width,
    out_width,
    out_pixels,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    INDEX_64: tl.constexpr,
):
    """A tile of columns, (BLOCK_CHANNELS, BLOCK_PIXELS): the samples, times the mask; 0 where not valid."""
    low_y, low_x, fraction_y, fraction_x = locate(
        offset_ptr, image, channel, pixel, valid, channels, height, width, out_width, out_pixels,
        stride_y, stride_x, padding_y, padding_x,
    )  # fmt: skip
    address, valid_00, valid_01, valid_10, valid_11 = corner_addresses(
        image, channel, low_y, low_x, valid, channels, height, width, INDEX_64
    )
    value_00, value_01, value_10, value_11 = gather(
        input_ptr, address, width, valid_00, valid_01, valid_10, valid_11
    )
    columns = blend(value_00, value_01, value_10, value_11, fraction_y, fraction_x)
    if mask_ptr is not None:
        modulation = mask_ptr + image * channels * out_pixels + channel * out_pixels + pixel
        columns *= tl.load(modulation, mask=valid, other=0.0).to(tl.float32)
    return columns


@triton.jit
def output_address(image, out, pixel, out_channels, out_pixels, CHANNELS_LAST: tl.constexpr):
    """Addresses in the output or its gradient; ``out`` counts all out channels."""
    if CHANNELS_LAST:
        return image * out_channels * out_pixels + pixel * out_channels + out
    return image * out_channels * out_pixels + out * out_pixels + pixel


@triton.jit
def forward(
    input_ptr,  # (N, C, H·W)
    offset_ptr,  # (N, 2·C, out_pixels)
    mask_ptr,  # (N, C, out_pixels) or None
    weight_ptr,  # (Cout, group_channels)
    bias_ptr,  # (Cout,) or None
    output_ptr,  # (N, Cout, out_pixels), or (N, out_pixels, Cout) if CHANNELS_LAST
    groups,
    group_channels,
    group_out,
    height,
    width,
    out_width,
    out_pixels,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """output = weight · columns + bias. One program: BLOCK_PIXELS pixels of an image, BLOCK_OUT out channels.

    Programs that differ in out channels only follow each other: they gather the same samples, from the cache.
    """
    program = tl.program_id(0)
    out_blocks = tl.cdiv(group_out, BLOCK_OUT)
    pixel_blocks = tl.cdiv(out_pixels, BLOCK_PIXELS)
    out_start = program % out_blocks * BLOCK_OUT
    program //= out_blocks
    pixel_start = program % pixel_blocks * BLOCK_PIXELS
    program //= pixel_blocks
    group = program % groups
    image = (program // groups).to(tl.int64)

    channels = groups * group_channels
    pixel = pixel_start + tl.arange(0, BLOCK_PIXELS)[None, :]
    out = out_start + tl.arange(0, BLOCK_OUT)[:, None]
    if INDEX_64:
        pixel, out = pixel.to(tl.int64), out.to(tl.int64)
    pixel_valid = pixel < out_pixels
    out_valid = out < group_out

    product = tl.zeros((BLOCK_OUT, BLOCK_PIXELS), tl.float32)
    for channel_start in range(0, group_channels, BLOCK_CHANNELS):
        channel = channel_start + tl.arange(0, BLOCK_CHANNELS)
        if INDEX_64:
            channel = channel.to(tl.int64)
        columns = sample(
            input_ptr, offset_ptr, mask_ptr, image, group * group_channels + channel[:, None], pixel,
            (channel[:, None] < group_channels) & pixel_valid, channels, height, width, out_width, out_pixels,
            stride_y, stride_x, padding_y, padding_x, INDEX_64,
        )  # (BLOCK_CHANNELS, BLOCK_PIXELS)  # fmt: skip
        weight = tl.load(
            weight_ptr + (group * group_out + out) * group_channels + channel[None, :],
            mask=out_valid & (channel[None, :] < group_channels),
            other=0.0,
        )  # (BLOCK_OUT, BLOCK_CHANNELS)
        product = multiply(weight, columns.to(weight.dtype), product, PRECISION)

    out += group * group_out
    if bias_ptr is not None:
        product += tl.load(bias_ptr + out, mask=out_valid, other=0.0).to(tl.float32)
    address = output_address(image, out, pixel, groups * group_out, out_pixels, CHANNELS_LAST)
    tl.store(output_ptr + address, product.to(output_ptr.dtype.element_ty), mask=out_valid & pixel_valid)


@triton.jit
def backward_samples(
    grad_output_ptr,  # (N, Cout, out_pixels), or (N, out_pixels, Cout) if CHANNELS_LAST
    input_ptr,  # (N, C, H·W)
    offset_ptr,  # (N, 2·C, out_pixels)
    mask_ptr,  # (N, C, out_pixels) or None
    weight_ptr,  # (Cout, group_channels)
    grad_input_ptr,  # (N, C, H·W), fp32 or int64 (FIXED_POINT), zeros; None if not wanted
    grad_offset_ptr,  # (N, 2·C, out_pixels) or None if not wanted
    grad_mask_ptr,  # (N, C, out_pixels) or None if not wanted
    scale_ptr,  # one fp32, a power of two, if FIXED_POINT, else None
    groups,
    group_channels,
    group_out,
    height,
    width,
    out_width,
    out_pixels,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    CHANNELS_LAST: tl.constexpr,
    FIXED_POINT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Gradients of input, offset and mask. One program: BLOCK_CHANNELS channels at BLOCK_PIXELS pixels.

    Each sample belongs to one program, so offset and mask gradients are plain stores.
    """
    program = tl.program_id(0)
    channel_blocks = tl.cdiv(group_channels, BLOCK_CHANNELS)
    pixel_blocks = tl.cdiv(out_pixels, BLOCK_PIXELS)
    channel_start = program % channel_blocks * BLOCK_CHANNELS
    program //= channel_blocks
    pixel_start = program % pixel_blocks * BLOCK_PIXELS
    program //= pixel_blocks
    group = program % groups
    image = (program // groups).to(tl.int64)

    channels = groups * group_channels
    pixel = pixel_start + tl.arange(0, BLOCK_PIXELS)[None, :]
    channel = channel_start + tl.arange(0, BLOCK_CHANNELS)[:, None]
    if INDEX_64:
        pixel, channel = pixel.to(tl.int64), channel.to(tl.int64)
    pixel_valid = pixel < out_pixels
    channel_valid = channel < group_channels

    gradient = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)  # of the columns
    for out_start in range(0, group_out, BLOCK_OUT):
        out = out_start + tl.arange(0, BLOCK_OUT)
        if INDEX_64:
            out = out.to(tl.int64)
        out_valid = out < group_out
        out += group * group_out
        weight = tl.load(
            weight_ptr + out[None, :] * group_channels + channel,
            mask=channel_valid & out_valid[None, :],
            other=0.0,
        )  # (BLOCK_CHANNELS, BLOCK_OUT)
        address = output_address(image, out[:, None], pixel, groups * group_out, out_pixels, CHANNELS_LAST)
        grad_output = tl.load(
            grad_output_ptr + address, mask=out_valid[:, None] & pixel_valid, other=0.0
        )  # (BLOCK_OUT, BLOCK_PIXELS)
        gradient = multiply(weight, grad_output, gradient, PRECISION)

    valid = channel_valid & pixel_valid
    channel += group * group_channels
    low_y, low_x, fraction_y, fraction_x = locate(
        offset_ptr, image, channel, pixel, valid, channels, height, width, out_width, out_pixels,
        stride_y, stride_x, padding_y, padding_x,
    )  # fmt: skip
    address, valid_00, valid_01, valid_10, valid_11 = corner_addresses(
        image, channel, low_y, low_x, valid, channels, height, width, INDEX_64
    )
    sample_address = image * channels * out_pixels + channel * out_pixels + pixel
    if (grad_offset_ptr is not None) or (grad_mask_ptr is not None):
        value_00, value_01, value_10, value_11 = gather(
            input_ptr, address, width, valid_00, valid_01, valid_10, valid_11
        )
        if grad_mask_ptr is not None:
            grad_mask = gradient * blend(value_00, value_01, value_10, value_11, fraction_y, fraction_x)
            tl.store(grad_mask_ptr + sample_address, grad_mask.to(grad_mask_ptr.dtype.element_ty), mask=valid)
    if mask_ptr is not None:
        gradient *= tl.load(mask_ptr + sample_address, mask=valid, other=0.0).to(tl.float32)
    if grad_offset_ptr is not None:
        grad_y = (1 - fraction_x) * (value_10 - value_00) + fraction_x * (value_11 - value_01)
        grad_x = (1 - fraction_y) * (value_01 - value_00) + fraction_y * (value_11 - value_10)
        offset_address = (
            grad_offset_ptr + image * 2 * channels * out_pixels + 2 * channel * out_pixels + pixel
        )
        element = grad_offset_ptr.dtype.element_ty
        tl.store(offset_address, (gradient * grad_y).to(element), mask=valid)
        tl.store(offset_address + out_pixels, (gradient * grad_x).to(element), mask=valid)
    if grad_input_ptr is not None:
        scale = 1.0
        if FIXED_POINT:
            scale = tl.load(scale_ptr)
        upper = (1 - fraction_y) * gradient
        lower = fraction_y * gradient
        scatter(grad_input_ptr, address, (1 - fraction_x) * upper, valid_00, scale, FIXED_POINT)
        scatter(grad_input_ptr, address + 1, fraction_x * upper, valid_01, scale, FIXED_POINT)
        scatter(grad_input_ptr, address + width, (1 - fraction_x) * lower, valid_10, scale, FIXED_POINT)
        scatter(grad_input_ptr, address + width + 1, fraction_x * lower, valid_11, scale, FIXED_POINT)


@triton.jit
def backward_weight(
    grad_output_ptr,  # (N, Cout, out_pixels), or (N, out_pixels, Cout) if CHANNELS_LAST
    input_ptr,  # (N, C, H·W)
    offset_ptr,  # (N, 2·C, out_pixels)
    mask_ptr,  # (N, C, out_pixels) or None
    partial_ptr,  # (splits, Cout, group_channels) fp32
    batch,
    share,  # blocks of pixels per split
    groups,
    group_channels,
    group_out,
    height,
    width,
    out_width,
    out_pixels,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """grad_weight = grad_output · columnsᵀ. One program: BLOCK_OUT × BLOCK_CHANNELS of it, some pixels.

    The columns are sampled again. Each share of the pixels has a partial sum of its own; they are
    added up afterwards, in a fixed order.
    """
    program = tl.program_id(0)
    out_blocks = tl.cdiv(group_out, BLOCK_OUT)
    channel_blocks = tl.cdiv(group_channels, BLOCK_CHANNELS)
    out_start = program % out_blocks * BLOCK_OUT
    program //= out_blocks
    channel_start = program % channel_blocks * BLOCK_CHANNELS
    program //= channel_blocks
    group = program % groups
    split = program // groups

    channels = groups * group_channels
    out = out_start + tl.arange(0, BLOCK_OUT)[:, None]
    channel = channel_start + tl.arange(0, BLOCK_CHANNELS)
    if INDEX_64:
        out, channel = out.to(tl.int64), channel.to(tl.int64)
    out_valid = out < group_out
    channel_valid = channel < group_channels
    out += group * group_out

    pixel_blocks = tl.cdiv(out_pixels, BLOCK_PIXELS)
    gradient = tl.zeros((BLOCK_OUT, BLOCK_CHANNELS), tl.float32)
    for step in range(0, share):
        block = split * share + step
        image = (block // pixel_blocks).to(tl.int64)
        pixel = block % pixel_blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[None, :]
        if INDEX_64:
            pixel = pixel.to(tl.int64)
        pixel_valid = pixel < tl.where(image < batch, out_pixels, 0)  # the last share may end past the batch
        columns = sample(
            input_ptr, offset_ptr, mask_ptr, image, group * group_channels + channel[:, None], pixel,
            channel_valid[:, None] & pixel_valid, channels, height, width, out_width, out_pixels,
            stride_y, stride_x, padding_y, padding_x, INDEX_64,
        )  # (BLOCK_CHANNELS, BLOCK_PIXELS)  # fmt: skip
        address = output_address(image, out, pixel, groups * group_out, out_pixels, CHANNELS_LAST)
        grad_output = tl.load(
            grad_output_ptr + address, mask=out_valid & pixel_valid, other=0.0
        )  # (BLOCK_OUT, BLOCK_PIXELS)
        columns = tl.trans(columns.to(grad_output.dtype))
        gradient = multiply(grad_output, columns, gradient, PRECISION)

    partial = split.to(tl.int64) * groups * group_out * group_channels
    partial += out * group_channels + channel[None, :]
    tl.store(partial_ptr + partial, gradient, mask=out_valid & channel_valid[None, :])
