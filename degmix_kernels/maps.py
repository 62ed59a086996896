"""Sizes, blocks and memory formats of maps and tokens, as plans of all families need them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from degmix_kernels.launch import needs_64_bit

_PROGRAMS = 1024  # of the backward pass: about one wave of eight programs on each of 132 multiprocessors
_BACKWARD_TILE = 2048  # elements; the backward pass keeps two fp32 sums of a tile
_ELEMENTS_PER_WARP = 512  # 16 per thread: two loads of 128 bits in half precision


def ceil_div(dividend: int, divisor: int) -> int:
    """Quotient rounded up. (``triton.cdiv`` takes microseconds outside of kernels.)"""
    return -(-dividend // divisor)


def power_of_two(size: int, smallest: int = 1) -> int:
    """The next power of two, at least ``smallest``."""
    return max(1 << max(size - 1, 0).bit_length(), smallest)


def block_of(size: int, largest: int, smallest: int = 16) -> int:
    """Block size along an axis: a power of two from ``smallest`` (16 for a matrix product) to ``largest``."""
    return max(smallest, min(largest, power_of_two(size)))


# --- memory formats ----------------------------------------------------------------------------------------


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is a channels_last map, and not at the same time contiguous (as with one channel)."""
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    if torch._C._are_functorch_transforms_active():  # PyTorch refuses to tell of a tensor inside vmap
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """How kernels lay out what is shaped like a tensor: channels_last if the tensor is, else contiguous."""
    return torch.channels_last if is_channels_last(tensor) else torch.contiguous_format


def laid_out(like: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, or copies of them, in the memory format of ``like``."""
    format_ = memory_format(like)
    return [None if each is None else each.contiguous(memory_format=format_) for each in tensors]


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, or contiguous copies of them."""
    return [None if each is None else each.contiguous() for each in tensors]


def empty_like(tensor: Tensor) -> Tensor:
    """A dense tensor like this one, uninitialised: channels_last if this one is, else contiguous."""
    return torch.empty_like(tensor, memory_format=memory_format(tensor))


def empty_contiguous(tensor: Tensor) -> Tensor:
    """A contiguous tensor like this one, uninitialised."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def readable(tokens: Tensor) -> Tensor:
    """The 4-D tensor itself if its last axis is contiguous, else a contiguous copy."""
    return tokens if tokens.shape[3] == 1 or tokens.stride(3) == 1 else tokens.contiguous()


def is_dense(tensor: Tensor) -> bool:
    """Whether a 4-D tensor is contiguous or channels_last."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous or channels_last, else a contiguous copy."""
    return tensor if is_dense(tensor) else tensor.contiguous()


# --- sizes and blocks --------------------------------------------------------------------------------------


def largest_unit(size: int) -> int:
    """The largest power of two up to 16 that divides a size."""
    return 16 if size % 16 == 0 else max(size & -size, 1)


class Sizes(NamedTuple):
    """A dense tensor as the kernels see it: images of (channels, pixels).

    Attributes:
        images: 1 where the pixels of all images are on one axis (``last``, but for three-dimensional tokens).
        channels: C.
        pixels: of an image; of all images, if ``last``.
        last: whether channels, not pixels, are contiguous: tokens, channels_last, 1×1 maps.
    """

    images: int
    channels: int
    pixels: int
    last: bool

    @classmethod
    def of(cls, x: Tensor) -> Sizes:
        """The sizes of a dense (N, C, H, W) or (tokens, C), or (images, tokens, C) with images kept apart."""
        images, channels, *axes = x.shape
        if len(axes) == 1:
            return cls(images, *axes, channels, True)
        pixels = math.prod(axes)
        if pixels == 1 or is_channels_last(x):
            return cls(1, channels, images * pixels, True)
        return cls(images, channels, pixels, False)

    @property
    def unit(self) -> int:
        """The largest power of two up to 16 that divides the size of the contiguous axis."""
        return largest_unit(self.channels if self.last else self.pixels)

    def arguments(self, blocks: tuple[int, int]) -> dict[str, int]:
        """Sizes as kernels take them: the contiguous one in units."""
        unit = self.unit
        return {
            "channels": self.channels // unit if self.last else self.channels,
            "pixels": self.pixels if self.last else self.pixels // unit,
            "channel_blocks": ceil_div(self.channels, blocks[0]),
            "pixel_blocks": ceil_div(self.pixels, blocks[1]),
        }

    def constants(self, blocks: tuple[int, int], *tensors: Tensor | None) -> dict[str, Any]:
        """Compile-time arguments."""
        return {
            "UNIT": self.unit,
            "LAST": self.last,
            "INDEX_64": needs_64_bit(*tensors),
            "BLOCK_CHANNELS": blocks[0],
            "BLOCK_PIXELS": blocks[1],
        }

    def blocks(self, tile: int) -> tuple[int, int]:
        """Channels and pixels of a tile of at most ``tile`` elements."""
        if self.last:
            channels = _block(self.channels, 256)
            return channels, min(tile // channels, power_of_two(self.pixels))
        pixels = _block(self.pixels, 1024)
        return min(tile // pixels, power_of_two(self.channels)), pixels


def backward_shares(sizes: Sizes) -> tuple[tuple[int, int], int, dict[str, int]]:
    """How a backward pass that sums per channel divides its tiles.

    Returns:
        The sides of a tile, the number of parts that are summed apart, each a program per block of channels,
        and the kernel's run-time sizes.
    """
    blocks = sizes.blocks(_BACKWARD_TILE)
    arguments = sizes.arguments(blocks)
    tiles = sizes.images * arguments["pixel_blocks"]
    parts = min(tiles, max(1, _PROGRAMS // arguments["channel_blocks"]))
    steps = ceil_div(tiles, max(parts, 1))
    return blocks, ceil_div(tiles, max(steps, 1)), {**arguments, "tiles": tiles, "steps": steps}


def _block(size: int, largest: int) -> int:
    """The block of 32 to ``largest`` elements that pads an axis least, the larger of equals."""
    if size <= 32:
        return power_of_two(size)
    largest = min(largest, power_of_two(size))
    candidates = [1 << bits for bits in range(5, largest.bit_length())]
    # A block twice the size is worth an eighth more of padding.
    best = candidates[0]
    for block in candidates[1:]:
        if 8 * ceil_div(size, block) * block <= 9 * ceil_div(size, best) * best:
            best = block
    return best


def warps(blocks: tuple[int, int]) -> int:
    """Warps for a tile."""
    return min(max(blocks[0] * blocks[1] // _ELEMENTS_PER_WARP, 1), 8)
