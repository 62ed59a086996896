"""Triton kernels of the deformable convolution for few channels per offset group: forward.

Tiles and their axes are those of ``tiles``. Small groups of the convolution share a tile (SPANS), so
that it is full. Their weight matrix is then block diagonal, with zeros between the groups.
"""

import triton
import triton.language as tl

from degmix_kernels.deform_conv.planar.tiles import load_offsets, multiply_groups, sample, tile_channels
from degmix_kernels.deform_conv.sampling import tensor_address
from degmix_kernels.epilogue import store_result


@triton.jit
def forward(
    input_ptr,
    offset_ptr,
    mask_ptr,  # or None
    weight_ptr,  # (Cout, group_channels, taps), or (Cout, taps, group_channels) if WEIGHT_LAST
    bias_ptr,  # (Cout,) or None
    output_ptr,
    pre_ptr,  # as the output: its value before the activation; or None
    means_ptr,  # (N · pixel blocks, Cout) fp32, or None
    squares_ptr,  # (N · pixel blocks, Cout) fp32, or None
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
    steps,  # tiles of a span, times taps
    ACTIVATION: tl.constexpr,
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
    PART: tl.constexpr,  # pixels that the epilogue takes at a time
):
    """output = act(weight · columns + bias). One program: BLOCK_PIXELS pixels, BLOCK_OUT channels of a span.

    Programs that differ in out channels only follow each other: they gather the same samples, from the cache.
    """
    program = tl.program_id(0)
    out_start = program % out_blocks * BLOCK_OUT
    program //= out_blocks
    pixel_blocks = tl.cdiv(out_pixels, BLOCK_PIXELS)
    image_block = program // spans  # counts the blocks of pixels of all images
    pixel_start = image_block % pixel_blocks * BLOCK_PIXELS
    image = (image_block // pixel_blocks).to(tl.int64)
    first_group = program % spans * span_groups
    end_group = tl.minimum(first_group + span_groups, groups)
    channel_start = first_group * group_channels
    channel_end = end_group * group_channels
    first_offset_group = channel_start // offset_channels

    channels = groups * group_channels
    offset_groups = channels // offset_channels
    input_ptr += image * channels * height * width
    offset_ptr += image * 2 * offset_groups * taps * out_pixels
    if mask_ptr is not None:
        mask_ptr += image * offset_groups * taps * out_pixels

    pixel = pixel_start + tl.arange(0, BLOCK_PIXELS)[None, None, :]
    first_y = (pixel // out_width * stride_y - padding_y).to(tl.int32)
    first_x = (pixel % out_width * stride_x - padding_x).to(tl.int32)
    out = first_group * group_out + out_start + tl.arange(0, BLOCK_OUT)[:, None]
    if INDEX_64:
        pixel, out = pixel.to(tl.int64), out.to(tl.int64)
    pixel_valid = pixel < out_pixels
    out_valid = out < end_group * group_out
    out_group = out // group_out

    lanes = tl.arange(0, BLOCK_GROUPS)[:, None, None]
    if INDEX_64:
        lanes = lanes.to(tl.int64)
    group = first_offset_group + lanes
    offset_y, offset_x = load_offsets(
        offset_ptr, group, 0, pixel, (group * offset_channels < channel_end) & pixel_valid,
        offset_groups, taps, out_pixels, OFFSET_LAST,
    )  # fmt: skip
    product = tl.zeros((BLOCK_OUT, BLOCK_PIXELS), tl.float32)
    for step in range(0, steps):
        tap = step % taps
        within_step = step // taps % within_steps
        group_start = first_offset_group + step // (taps * within_steps) * BLOCK_GROUPS
        within_start = within_step * BLOCK_WITHIN
        if BLOCK_GROUPS == 1:  # a span may start inside an offset group
            within_start += tl.maximum(channel_start - group_start * offset_channels, 0)
        channel, channel_valid = tile_channels(
            group_start, within_start, offset_channels, INDEX_64, BLOCK_GROUPS, BLOCK_WITHIN, PACKED
        )
        channel_valid = channel_valid & (channel >= channel_start) & (channel < channel_end)

        weight_group = channel // group_channels if SPANS else first_group
        weight_valid = out_valid & channel_valid[None, :]
        if SPANS:
            weight_valid = weight_valid & (out_group == weight_group[None, :])
        weight_channel = channel - weight_group * group_channels
        weight = tl.load(
            weight_ptr + tensor_address(out, weight_channel[None, :], tap, group_channels, taps, WEIGHT_LAST),
            mask=weight_valid,
            other=0.0,
        )  # (BLOCK_OUT, ROWS)

        # The offsets of the next step are on their way while this one gathers and multiplies: they are most
        # of what comes from memory, and known in advance.
        this_y, this_x = offset_y, offset_x
        group = first_offset_group + (step + 1) // (taps * within_steps) * BLOCK_GROUPS + lanes
        offset_y, offset_x = load_offsets(
            offset_ptr, group, (step + 1) % taps, pixel,
            (group * offset_channels < channel_end) & pixel_valid,
            offset_groups, taps, out_pixels, OFFSET_LAST,
        )  # fmt: skip

        group = group_start + lanes
        columns = sample(
            input_ptr, mask_ptr, this_y, this_x,
            first_y + tap // kernel_width * dilation_y, first_x + tap % kernel_width * dilation_x,
            group, tap,
            tl.reshape(channel, (BLOCK_GROUPS, BLOCK_WITHIN, 1)),
            tl.reshape(channel_valid, (BLOCK_GROUPS, BLOCK_WITHIN, 1)),
            pixel, (group * offset_channels < channel_end) & pixel_valid, channels, offset_groups,
            height, width, taps, out_pixels,
            INPUT_LAST, MASK_LAST, INDEX_64,
        )  # fmt: skip
        columns = tl.reshape(columns, (BLOCK_GROUPS * BLOCK_WITHIN, BLOCK_PIXELS))
        product = multiply_groups(
            weight, columns.to(weight.dtype), product, out_group, channel[:, None] // group_channels,
            first_group, span_groups, SPANS, PRECISION,
        )  # fmt: skip

    if bias_ptr is not None:
        product += tl.load(bias_ptr + out, mask=out_valid, other=0.0).to(tl.float32)
    out_channels = groups * group_out
    output_ptr += image * out_channels * out_pixels
    if pre_ptr is not None:
        pre_ptr += image * out_channels * out_pixels
    if means_ptr is not None:  # of what the backward pass will see: its sum of deviations is then 0
        product = product.to(output_ptr.dtype.element_ty)
    mean, squares = store_result(
        product, output_ptr, pre_ptr, out, out_valid, pixel_start, out_channels, out_pixels,
        ACTIVATION, OUTPUT_LAST, INDEX_64, means_ptr is not None, PART,
    )  # fmt: skip
    if means_ptr is not None:
        part = image_block.to(tl.int64) * out_channels + out
        tl.store(means_ptr + part, mean, mask=out_valid)
        tl.store(squares_ptr + part, squares, mask=out_valid)
