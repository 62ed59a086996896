"""Tiles of the planar deformable convolution: their channels, offsets, samples and products.

A tile is BLOCK_GROUPS offset groups × BLOCK_WITHIN channels of each × BLOCK_PIXELS pixels. Its coordinates
are those of a (BLOCK_GROUPS, 1, BLOCK_PIXELS) tile, so channels that share offsets share the work on them.
For a matrix product the first two axes become one: ROWS = BLOCK_GROUPS · BLOCK_WITHIN. Neighbouring lanes
hold neighbouring pixels and, in planar tensors, read neighbouring addresses.

A block of several offset groups always holds all of their channels (BLOCK_WITHIN ≥ offset_channels); PACKED
says that it holds nothing else.
"""

import triton
import triton.language as tl

from degmix_kernels.deform_conv.sampling import blend, corners_on_map, locate, tensor_address
from degmix_kernels.product import multiply


@triton.jit
def tile_channels(
    group_start,  # first offset group
    within_start,  # first channel in it; 0 with several groups
    offset_channels,
    INDEX_64: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_WITHIN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Channels of a tile's rows, (ROWS,), and whether each belongs to its own offset group."""
    row = tl.arange(0, BLOCK_GROUPS * BLOCK_WITHIN)
    within = within_start + row % BLOCK_WITHIN
    if INDEX_64:
        row, within = row.to(tl.int64), within.to(tl.int64)
    if PACKED or BLOCK_GROUPS == 1:  # consecutive channels, which the compiler then knows
        channel = group_start * offset_channels + within_start + row
    else:
        channel = (group_start + row // BLOCK_WITHIN) * offset_channels + within
    return channel, within < offset_channels


@triton.jit
def multiply_groups(
    left,  # (M, K), zero between channels of different groups
    right,  # (K, N)
    accumulator,  # (M, N)
    left_group,  # (M, 1)
    right_group,  # (K, 1)
    group_start,
    group_count,
    SPANS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """accumulator + left · right, where no NaN or infinity of one group reaches another's rows."""
    if not SPANS:
        return multiply(left, right, accumulator, PRECISION)
    wide = right.to(tl.float32)
    if tl.max(tl.max(((wide - wide) != 0).to(tl.int32), axis=1), axis=0) == 0:
        accumulator = multiply(left, right, accumulator, PRECISION)
    else:
        for step in range(0, group_count):
            own = tl.where(right_group == group_start + step, right, tl.zeros_like(right))
            product = multiply(left, own, accumulator, PRECISION)
            accumulator = tl.where(left_group == group_start + step, product, accumulator)
    return accumulator


@triton.jit
def load_offsets(
    offset_ptr,  # of the image
    group,  # (BLOCK_GROUPS, 1, 1)
    tap,
    pixel,  # (1, 1, BLOCK_PIXELS)
    valid,  # (BLOCK_GROUPS, 1, BLOCK_PIXELS)
    offset_groups,
    taps,
    out_pixels,
    OFFSET_LAST: tl.constexpr,
):
    """Vertical and horizontal offsets of a tap, as stored, 0 where not valid."""
    address = tensor_address(
        0, (group * taps + tap) * 2, pixel, 2 * offset_groups * taps, out_pixels, OFFSET_LAST
    )
    step = 1 if OFFSET_LAST else out_pixels
    return (
        tl.load(offset_ptr + address, mask=valid, other=0.0),
        tl.load(offset_ptr + address + step, mask=valid, other=0.0),
    )


@triton.jit
def corner_addresses(
    low_y, low_x, channel, channels, height, width, INPUT_LAST: tl.constexpr, INDEX_64: tl.constexpr
):
    """Address of the upper left corner in its image, and the steps to the next column and the next row."""
    if INDEX_64:
        low_y, low_x = low_y.to(tl.int64), low_x.to(tl.int64)
    if INPUT_LAST:
        return (low_y * width + low_x) * channels + channel, channels, width * channels
    return channel * height * width + (low_y * width + low_x), 1, width


@triton.jit
def gather(input_ptr, address, column, row, valid_00, valid_01, valid_10, valid_11):
    """The four corner values of each sample, 0 off the map."""
    value_00 = tl.load(input_ptr + address, mask=valid_00, other=0.0).to(tl.float32)
    value_01 = tl.load(input_ptr + address + column, mask=valid_01, other=0.0).to(tl.float32)
    value_10 = tl.load(input_ptr + address + row, mask=valid_10, other=0.0).to(tl.float32)
    value_11 = tl.load(input_ptr + address + row + column, mask=valid_11, other=0.0).to(tl.float32)
    return value_00, value_01, value_10, value_11


@triton.jit
def sample(
    input_ptr,  # of the image
    mask_ptr,  # of the image, or None
    offset_y,  # (BLOCK_GROUPS, 1, BLOCK_PIXELS)
    offset_x,
    base_y,  # (1, 1, BLOCK_PIXELS), of the tap
    base_x,
    group,  # (BLOCK_GROUPS, 1, 1)
    tap,
    channel,  # (BLOCK_GROUPS, BLOCK_WITHIN, 1)
    channel_valid,
    pixel,  # (1, 1, BLOCK_PIXELS)
    valid,  # (BLOCK_GROUPS, 1, BLOCK_PIXELS)
    channels,
    offset_groups,
    height,
    width,
    taps,
    out_pixels,
    INPUT_LAST: tl.constexpr,
    MASK_LAST: tl.constexpr,
    INDEX_64: tl.constexpr,
):
    """Columns, (BLOCK_GROUPS, BLOCK_WITHIN, BLOCK_PIXELS): samples times mask, 0 where not valid."""
    low_y, low_x, fraction_y, fraction_x = locate(
        offset_y.to(tl.float32), offset_x.to(tl.float32), base_y, base_x, height, width
    )
    on_00, on_01, on_10, on_11 = corners_on_map(low_y, low_x, valid, height, width)
    address, column, row = corner_addresses(
        low_y, low_x, channel, channels, height, width, INPUT_LAST, INDEX_64
    )
    value_00, value_01, value_10, value_11 = gather(
        input_ptr, address, column, row, on_00 & channel_valid, on_01 & channel_valid,
        on_10 & channel_valid, on_11 & channel_valid,
    )  # fmt: skip
    columns = blend(value_00, value_01, value_10, value_11, fraction_y, fraction_x)
    if mask_ptr is not None:
        modulation = tensor_address(0, group * taps + tap, pixel, offset_groups * taps, out_pixels, MASK_LAST)
        columns *= tl.load(mask_ptr + modulation, mask=valid, other=0.0).to(tl.float32)
    return tl.where(channel_valid, columns, 0.0)  # a NaN offset reaches the padding of its group, too
