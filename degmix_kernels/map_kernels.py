"""What kernels of several families share: tiles of maps and tokens, and values of their channels.

A tile is (channels, pixels); where an image's pixels follow each other in memory it is planar, else LAST:
(pixels, channels) in memory, the images' pixels on one axis. ``UNIT`` divides the size of the axis that is
contiguous, which arrives as a multiple of it, so that the compiler knows how wide it may load.
"""

import triton
import triton.language as tl


@triton.jit
def in_elements(channels, pixels, UNIT: tl.constexpr, LAST: tl.constexpr):
    """A map's sizes as ``Sizes.arguments`` of the plan passes them, the contiguous one no longer in units."""
    if LAST:
        return channels * UNIT, pixels
    return channels, pixels * UNIT


@triton.jit
def address_of(image, channel, pixel, channels, pixels, LAST: tl.constexpr):
    """Addresses of elements of a map: (BLOCK_CHANNELS, BLOCK_PIXELS) of a column and a row of them."""
    return pixel * channels + channel if LAST else (image * channels + channel) * pixels + pixel


@triton.jit
def tile_of_map(
    channels,  # as ``pixels``: a kernel's argument, perhaps in units
    pixels,
    channel_blocks,
    pixel_blocks,
    UNIT: tl.constexpr,
    LAST: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """This program's tile where every tile has a program.

    Returns its channels and which exist, both (BLOCK_CHANNELS,), its pixels, (1, BLOCK_PIXELS), which of its
    elements exist and their addresses, both (BLOCK_CHANNELS, BLOCK_PIXELS).
    """
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    channels, pixels = in_elements(channels, pixels, UNIT, LAST)
    if LAST:  # neighbouring programs, neighbouring memory
        image = 0
        pixel_block, channel_block = program // channel_blocks, program % channel_blocks
    else:
        plane, pixel_block = program // pixel_blocks, program % pixel_blocks
        image, channel_block = plane // channel_blocks, plane % channel_blocks
    row = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    row_valid = row < channels
    pixel = pixel_block * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[None, :]
    valid = row_valid[:, None] & (pixel < pixels)
    return row, row_valid, pixel, valid, address_of(image, row[:, None], pixel, channels, pixels, LAST)


@triton.jit
def pixels_of_tile(tile, tiles, pixels, pixel_blocks, BLOCK_PIXELS: tl.constexpr):
    """A tile's image, its pixels and which exist, both (1, BLOCK_PIXELS), where a program has several tiles.

    The last program's may end past the last of all ``tiles``: no pixels exist there.
    """
    image, pixel_block = tile // pixel_blocks, tile % pixel_blocks
    pixel = pixel_block * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)[None, :]
    return image, pixel, pixel < tl.where(tile < tiles, pixels, 0)


@triton.jit
def vector(pointer, channel, valid):
    """Values of a row of channels, fp32; 0 for those past the last."""
    return tl.load(pointer + channel, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def scale_of(variance_ptr, weight_ptr, eps, channel, valid):
    """weight / √(variance + eps) of a row of channels."""
    scale = tl.rsqrt(vector(variance_ptr, channel, valid) + eps)
    if weight_ptr is not None:
        scale *= vector(weight_ptr, channel, valid)
    return scale
