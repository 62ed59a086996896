"""The Triton kernel of ``coordinate_bias``: one pass over the map, tables from the cache.

A tile is (channels, pixels), planar or LAST as in ``map_kernels``. Sums are fp32.
"""

import triton
import triton.language as tl

from degmix_kernels.map_kernels import tile_of_map


@triton.jit
def border(position, size):
    """Which slice of a table belongs to a position: 0 at the first, the table's last at the last, else 1."""
    return tl.where(position == size - 1, tl.minimum(size, 3) - 1, tl.minimum(position, 1))


@triton.jit
def forward(
    x_ptr,
    rows_ptr,  # (groups, row_channels, height, min(width, 3))
    columns_ptr,  # (groups, column_channels, min(height, 3), width)
    output_ptr,  # laid out as x
    channels,
    pixels,
    channel_blocks,
    pixel_blocks,
    height,
    width,
    row_channels,
    column_channels,
    UNIT: tl.constexpr,
    LAST: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """x + rows or columns of one tile."""
    channel, _, pixel, valid, address = tile_of_map(
        channels, pixels, channel_blocks, pixel_blocks, UNIT, LAST, INDEX_64, BLOCK_CHANNELS, BLOCK_PIXELS
    )
    channel = channel[:, None]
    row, column = pixel // width % height, pixel % width
    group = channel // (row_channels + column_channels)
    part = channel % (row_channels + column_channels)
    by_row, by_column = part < row_channels, part >= row_channels
    row_index = (group * row_channels + part) * height + row
    row_index = row_index * tl.minimum(width, 3) + border(column, width)
    column_index = (group * column_channels + part - row_channels) * tl.minimum(height, 3)
    column_index = (column_index + border(row, height)) * width + column
    result = tl.load(x_ptr + address, mask=valid, other=0.0).to(tl.float32)
    result += tl.load(rows_ptr + row_index, mask=valid & by_row, other=0.0).to(tl.float32)
    result += tl.load(columns_ptr + column_index, mask=valid & by_column, other=0.0).to(tl.float32)
    tl.store(output_ptr + address, result.to(output_ptr.dtype.element_ty), mask=valid)
