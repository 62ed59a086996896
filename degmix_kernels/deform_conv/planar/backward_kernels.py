"""Triton kernels of the gradients of the planar deformable convolution; see ``kernels``."""

import triton
import triton.language as tl

from degmix_kernels.deform_conv.planar.tiles import (
    corner_addresses,
    gather,
    load_offsets,
    multiply_groups,
    sample,
    tile_channels,
)
from degmix_kernels.deform_conv.sampling import (
    blend,
    corners_on_map,
    is_number,
    locate,
    scatter,
    tensor_address,
)
from degmix_kernels.epilogue import load_gradient
from degmix_kernels.product import multiply


@triton.jit
def backward_samples(
    grad_ptr,  # as the output
    pre_ptr,  # with constant_ptr and linear_ptr, see epilogue.load_gradient
    constant_ptr,
    linear_ptr,
    input_ptr,
    offset_ptr,
    mask_ptr,  # or None
    weight_ptr,  # (Cout, group_channels, taps), or (Cout, taps, group_channels) if WEIGHT_LAST
    grad_input_ptr,  # as the input, fp32 or int64 (FIXED_POINT), zeros; None if not wanted
    grad_offset_ptr,  # as the offset; None if not wanted
    grad_mask_ptr,  # as the mask; None if not wanted
    scale_ptr,  # one fp32, a power of two, if FIXED_POINT, else None
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
    span_groups,  # the most groups of the convolution in a tile
    blocks,  # of offset groups
    within_steps,  # of an offset group
    out_steps,  # blocks of out channels of a tile
    ACTIVATION: tl.constexpr,
    FIXED_POINT: tl.constexpr,
    INPUT_LAST: tl.constexpr,
    OFFSET_LAST: tl.constexpr,
    MASK_LAST: tl.constexpr,
    OUTPUT_LAST: tl.constexpr,
    WEIGHT_LAST: tl.constexpr,
    SPANS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_WITHIN: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Gradients of input, offset and mask. One program: BLOCK_GROUPS offset groups at BLOCK_PIXELS pixels.

    Each sample belongs to one program, so offset and mask gradients are plain stores.
    """
    program = tl.program_id(0)
    group_start = program % blocks * BLOCK_GROUPS
    program //= blocks
    pixel_blocks = tl.cdiv(out_pixels, BLOCK_PIXELS)
    pixel_start = program % pixel_blocks * BLOCK_PIXELS
    image = (program // pixel_blocks).to(tl.int64)

    channels = groups * group_channels
    out_channels = groups * group_out
    offset_groups = channels // offset_channels
    samples = image * offset_groups * taps * out_pixels
    offset_ptr += 2 * samples
    input_ptr += image * channels * height * width
    grad_ptr += image * out_channels * out_pixels
    if pre_ptr is not None:
        pre_ptr += image * out_channels * out_pixels
    if mask_ptr is not None:
        mask_ptr += samples
    if grad_input_ptr is not None:
        grad_input_ptr += image * channels * height * width
    if grad_offset_ptr is not None:
        grad_offset_ptr += 2 * samples
    if grad_mask_ptr is not None:
        grad_mask_ptr += samples
    scale = 1.0
    if FIXED_POINT:
        scale = tl.load(scale_ptr)

    pixel = pixel_start + tl.arange(0, BLOCK_PIXELS)[None, None, :]
    out_pixel = pixel_start + tl.arange(0, BLOCK_PIXELS)[None, :]
    first_y = (pixel // out_width * stride_y - padding_y).to(tl.int32)
    first_x = (pixel % out_width * stride_x - padding_x).to(tl.int32)
    group = group_start + tl.arange(0, BLOCK_GROUPS)[:, None, None]
    if INDEX_64:
        pixel, out_pixel, group = pixel.to(tl.int64), out_pixel.to(tl.int64), group.to(tl.int64)
    valid = (group < offset_groups) & (pixel < out_pixels)

    for tap in range(0, taps):
        offset_y, offset_x = load_offsets(
            offset_ptr, group, tap, pixel, valid, offset_groups, taps, out_pixels, OFFSET_LAST
        )
        base_y = first_y + tap // kernel_width * dilation_y
        base_x = first_x + tap % kernel_width * dilation_x
        low_y, low_x, fraction_y, fraction_x = locate(
            offset_y.to(tl.float32), offset_x.to(tl.float32), base_y, base_x, height, width
        )
        on_00, on_01, on_10, on_11 = corners_on_map(low_y, low_x, valid, height, width)
        modulation = 1.0
        sample_address = tensor_address(
            0, group * taps + tap, pixel, offset_groups * taps, out_pixels, MASK_LAST
        )
        if mask_ptr is not None:
            modulation = tl.load(mask_ptr + sample_address, mask=valid, other=0.0).to(tl.float32)
        grad_y = tl.zeros((BLOCK_GROUPS, 1, BLOCK_PIXELS), tl.float32)
        grad_x = tl.zeros((BLOCK_GROUPS, 1, BLOCK_PIXELS), tl.float32)
        grad_mask = tl.zeros((BLOCK_GROUPS, 1, BLOCK_PIXELS), tl.float32)

        for within_step in range(0, within_steps):
            within_start = within_step * BLOCK_WITHIN
            channel, channel_valid = tile_channels(
                group_start, within_start, offset_channels, INDEX_64, BLOCK_GROUPS, BLOCK_WITHIN, PACKED
            )
            channel_valid = channel_valid & (channel < channels)
            first_group = (group_start * offset_channels + within_start) // group_channels
            if SPANS:
                weight_group = channel // group_channels
                out_end = tl.minimum(first_group + span_groups, groups) * group_out
            else:
                weight_group = first_group
                out_end = (first_group + 1) * group_out
            weight_channel = (channel - weight_group * group_channels)[:, None]

            gradient = tl.zeros((BLOCK_GROUPS * BLOCK_WITHIN, BLOCK_PIXELS), tl.float32)  # of the columns
            for out_step in range(0, out_steps):
                out = first_group * group_out + out_step * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
                if INDEX_64:
                    out = out.to(tl.int64)
                out_valid = out < out_end
                out_group = out // group_out
                weight_valid = channel_valid[:, None] & out_valid[None, :]
                if SPANS:
                    weight_valid = weight_valid & (weight_group[:, None] == out_group[None, :])
                address = tensor_address(out[None, :], weight_channel, tap, group_channels, taps, WEIGHT_LAST)
                weight = tl.load(weight_ptr + address, mask=weight_valid, other=0.0)  # (ROWS, BLOCK_OUT)
                grad_out = load_gradient(
                    grad_ptr, pre_ptr, constant_ptr, linear_ptr,
                    tensor_address(0, out[:, None], out_pixel, out_channels, out_pixels, OUTPUT_LAST),
                    out[:, None], out_valid[:, None], out_valid[:, None] & (out_pixel < out_pixels),
                    ACTIVATION,
                )  # (BLOCK_OUT, BLOCK_PIXELS)  # fmt: skip
                gradient = multiply_groups(
                    weight, grad_out, gradient, channel[:, None] // group_channels, out_group[:, None],
                    first_group, span_groups, SPANS, PRECISION,
                )  # fmt: skip

            gradient = tl.reshape(gradient, (BLOCK_GROUPS, BLOCK_WITHIN, BLOCK_PIXELS))
            tile_valid = tl.reshape(channel_valid, (BLOCK_GROUPS, BLOCK_WITHIN, 1))
            gradient = tl.where(tile_valid, gradient, 0.0)  # the padding may hold 0 · NaN
            address, column, row = corner_addresses(
                low_y, low_x, tl.reshape(channel, (BLOCK_GROUPS, BLOCK_WITHIN, 1)), channels, height, width,
                INPUT_LAST, INDEX_64,
            )  # fmt: skip
            valid_00, valid_01 = on_00 & tile_valid, on_01 & tile_valid
            valid_10, valid_11 = on_10 & tile_valid, on_11 & tile_valid
            if (grad_offset_ptr is not None) or (grad_mask_ptr is not None):
                value_00, value_01, value_10, value_11 = gather(
                    input_ptr, address, column, row, valid_00, valid_01, valid_10, valid_11
                )
                if grad_mask_ptr is not None:
                    value = blend(value_00, value_01, value_10, value_11, fraction_y, fraction_x)
                    grad_mask += tl.sum(gradient * value, axis=1, keep_dims=True)
            gradient *= modulation
            if grad_offset_ptr is not None:
                slope_y = (1 - fraction_x) * (value_10 - value_00) + fraction_x * (value_11 - value_01)
                slope_x = (1 - fraction_y) * (value_01 - value_00) + fraction_y * (value_11 - value_10)
                grad_y += tl.sum(gradient * slope_y, axis=1, keep_dims=True)
                grad_x += tl.sum(gradient * slope_x, axis=1, keep_dims=True)
            if grad_input_ptr is not None:
                upper = (1 - fraction_y) * gradient
                lower = fraction_y * gradient
                right = address + column
                scatter(grad_input_ptr, address, (1 - fraction_x) * upper, valid_00, scale, FIXED_POINT)
                scatter(grad_input_ptr, right, fraction_x * upper, valid_01, scale, FIXED_POINT)
                scatter(grad_input_ptr, address + row, (1 - fraction_x) * lower, valid_10, scale, FIXED_POINT)
                scatter(grad_input_ptr, right + row, fraction_x * lower, valid_11, scale, FIXED_POINT)

        if grad_mask_ptr is not None:
            element = grad_mask_ptr.dtype.element_ty
            tl.store(grad_mask_ptr + sample_address, grad_mask.to(element), mask=valid)
        if grad_offset_ptr is not None:
            # A coordinate off the map is a constant, whatever gradient arrives there.
            grad_y = tl.where((low_y < -1) & is_number(offset_y), 0.0, grad_y)
            grad_x = tl.where((low_x < -1) & is_number(offset_x), 0.0, grad_x)
            offset_address = tensor_address(
                0, (group * taps + tap) * 2, pixel, 2 * offset_groups * taps, out_pixels, OFFSET_LAST
            )
            element = grad_offset_ptr.dtype.element_ty
            tl.store(grad_offset_ptr + offset_address, grad_y.to(element), mask=valid)
            offset_address += 1 if OFFSET_LAST else out_pixels
            tl.store(grad_offset_ptr + offset_address, grad_x.to(element), mask=valid)


@triton.jit
def backward_weight(
    grad_ptr,  # as the output
    pre_ptr,  # with constant_ptr and linear_ptr, see epilogue.load_gradient
    constant_ptr,
    linear_ptr,
    input_ptr,
    offset_ptr,
    mask_ptr,  # or None
    partial_ptr,  # (splits, taps, Cout, group_channels) fp32
    bias_partial_ptr,  # (splits, Cout) fp32, or None if not wanted
    batch,
    share,  # blocks of pixels per split
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
    span_groups,  # groups of the convolution that share programs
    spans,
    out_blocks,  # of a span
    within_steps,  # of a group, in a span
    tiles,  # of a span
    ACTIVATION: tl.constexpr,
    INPUT_LAST: tl.constexpr,
    OFFSET_LAST: tl.constexpr,
    MASK_LAST: tl.constexpr,
    OUTPUT_LAST: tl.constexpr,
    SPANS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_WITHIN: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """grad_weight = grad_output · columnsᵀ. One program: BLOCK_OUT × ROWS of a tap, from some of the pixels.

    The columns are sampled again. Each share of the pixels has a partial sum of its own; they are added up
    afterwards, in a fixed order. The programs of a span's first tile also sum up the gradient of the bias.
    """
    program = tl.program_id(0)
    out_block = program % out_blocks
    program //= out_blocks
    tile = program % tiles
    program //= tiles
    tap = program % taps
    program //= taps
    first_group = program % spans * span_groups
    split = program // spans

    channels = groups * group_channels
    out_channels = groups * group_out
    offset_groups = channels // offset_channels
    end_group = tl.minimum(first_group + span_groups, groups)
    channel_start = first_group * group_channels
    channel_end = end_group * group_channels
    group_start = channel_start // offset_channels + tile // within_steps * BLOCK_GROUPS
    within_start = tile % within_steps * BLOCK_WITHIN
    if BLOCK_GROUPS == 1:  # a span may start inside an offset group
        within_start += tl.maximum(channel_start - group_start * offset_channels, 0)
    channel, channel_valid = tile_channels(
        group_start, within_start, offset_channels, INDEX_64, BLOCK_GROUPS, BLOCK_WITHIN, PACKED
    )
    channel_valid = channel_valid & (channel >= channel_start) & (channel < channel_end)
    group = group_start + tl.arange(0, BLOCK_GROUPS)[:, None, None]
    out = first_group * group_out + out_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    if INDEX_64:
        group, out = group.to(tl.int64), out.to(tl.int64)
    out_valid = out < end_group * group_out
    sums_bias = (tile == 0) & (tap == 0)

    pixel_blocks = tl.cdiv(out_pixels, BLOCK_PIXELS)
    gradient = tl.zeros((BLOCK_OUT, BLOCK_GROUPS * BLOCK_WITHIN), tl.float32)
    grad_bias = tl.zeros((BLOCK_OUT, 1), tl.float32)
    for step in range(0, share):
        block = split * share + step
        image = (block // pixel_blocks).to(tl.int64)
        end = tl.where(image < batch, out_pixels, 0)  # the last share may end past the batch
        pixel_start = block % pixel_blocks * BLOCK_PIXELS
        pixel = pixel_start + tl.arange(0, BLOCK_PIXELS)[None, None, :]
        out_pixel = pixel_start + tl.arange(0, BLOCK_PIXELS)[None, :]
        base_y = (pixel // out_width * stride_y - padding_y).to(tl.int32) + tap // kernel_width * dilation_y
        base_x = (pixel % out_width * stride_x - padding_x).to(tl.int32) + tap % kernel_width * dilation_x
        if INDEX_64:
            pixel, out_pixel = pixel.to(tl.int64), out_pixel.to(tl.int64)
        valid = (group * offset_channels < channel_end) & (pixel < end)
        samples = image * offset_groups * taps * out_pixels
        offset_y, offset_x = load_offsets(
            offset_ptr + 2 * samples, group, tap, pixel, valid, offset_groups, taps, out_pixels, OFFSET_LAST
        )
        grad_out = load_gradient(
            grad_ptr + image * out_channels * out_pixels,
            None if pre_ptr is None else pre_ptr + image * out_channels * out_pixels,
            constant_ptr, linear_ptr,
            tensor_address(0, out, out_pixel, out_channels, out_pixels, OUTPUT_LAST),
            out, out_valid, out_valid & (out_pixel < end), ACTIVATION,
        )  # (BLOCK_OUT, BLOCK_PIXELS)  # fmt: skip
        columns = sample(
            input_ptr + image * channels * height * width,
            None if mask_ptr is None else mask_ptr + samples,
            offset_y, offset_x, base_y, base_x, group, tap,
            tl.reshape(channel, (BLOCK_GROUPS, BLOCK_WITHIN, 1)),
            tl.reshape(channel_valid, (BLOCK_GROUPS, BLOCK_WITHIN, 1)),
            pixel, valid, channels, offset_groups, height, width, taps, out_pixels,
            INPUT_LAST, MASK_LAST, INDEX_64,
        )  # fmt: skip
        columns = tl.reshape(columns, (BLOCK_GROUPS * BLOCK_WITHIN, BLOCK_PIXELS)).to(grad_out.dtype)
        gradient = multiply(grad_out, tl.trans(columns), gradient, PRECISION)
        if bias_partial_ptr is not None:  # noqa: SIM102  (settled when the kernel is compiled)
            if sums_bias:
                grad_bias += tl.sum(grad_out.to(tl.float32), axis=1, keep_dims=True)

    weight_group = channel // group_channels
    stored = out_valid & channel_valid[None, :]
    if SPANS:
        stored = stored & (out // group_out == weight_group[None, :])
    partial_ptr += (split.to(tl.int64) * taps + tap) * out_channels * group_channels
    address = out * group_channels + (channel - weight_group * group_channels)[None, :]
    tl.store(partial_ptr + address, gradient, mask=stored)
    if bias_partial_ptr is not None:  # noqa: SIM102
        if sums_bias:
            bias_partial_ptr += split.to(tl.int64) * out_channels
            tl.store(bias_partial_ptr + out, grad_bias, mask=out_valid)
