"""Launches of ``batch_norm``'s kernels: sizes, blocks, shares. Plans touch no memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from degmix_kernels import layout
from degmix_kernels.batch_norm import kernels
from degmix_kernels.launch import Launch, needs_64_bit

_PROGRAMS = 1024  # of the backward pass: about one wave of eight programs on each of 132 multiprocessors
_FORWARD_TILE, _BACKWARD_TILE = 4096, 2048  # elements; the backward pass keeps two fp32 sums of a tile
_ELEMENTS_PER_WARP = 512  # 16 per thread: two loads of 128 bits in half precision


def ceil_div(dividend: int, divisor: int) -> int:
    """Quotient rounded up."""
    return -(-dividend // divisor)


def largest_unit(size: int) -> int:
    """The largest power of two up to 16 that divides a size."""
    return 16 if size % 16 == 0 else max(size & -size, 1)


def is_last(x: Tensor) -> bool:
    """Whether the kernels see a dense tensor as (pixels, channels): tokens, channels_last, 1×1 maps."""
    return x.dim() == 2 or layout.is_channels_last(x) or x.shape[2] * x.shape[3] == 1


@dataclass(frozen=True)
class Sizes:
    """A dense tensor as the kernels see it: images of (channels, pixels).

    Attributes:
        images: 1 where the pixels of all images are on one axis (``last``, but for three-dimensional tokens).
        channels: C.
        pixels: of an image; of all images, if ``last``.
        last: whether channels, not pixels, are contiguous.
    """

    images: int
    channels: int
    pixels: int
    last: bool

    @classmethod
    def of(cls, x: Tensor) -> Sizes:
        """The sizes of a dense (N, C, H, W) or (tokens, C), or (images, tokens, C) with images kept apart."""
        if x.dim() == 3:
            return cls(x.shape[0], x.shape[2], x.shape[1], True)
        images, channels = x.shape[:2]
        pixels = x.shape[2] * x.shape[3] if x.dim() == 4 else 1
        return cls(1, channels, images * pixels, True) if is_last(x) else cls(images, channels, pixels, False)

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
            return channels, min(tile // channels, _power_of_two(self.pixels))
        pixels = _block(self.pixels, 1024)
        return min(tile // pixels, _power_of_two(self.channels)), pixels


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


def _power_of_two(size: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(size - 1, 0).bit_length()


def _block(size: int, largest: int) -> int:
    """The block of 32 to ``largest`` elements that pads an axis least, the larger of equals."""
    if size <= 32:
        return _power_of_two(size)
    largest = min(largest, _power_of_two(size))
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


def plan_forward(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    eps: float,
    activation: str = "identity",
) -> Launch:
    """The forward pass on dense tensors, vectors contiguous; what is normalised is the activation of x."""
    sizes = Sizes.of(x)
    blocks = sizes.blocks(_FORWARD_TILE)
    arguments = sizes.arguments(blocks)
    return Launch(
        kernels.forward,
        sizes.images * arguments["channel_blocks"] * arguments["pixel_blocks"],
        {
            "x_ptr": x,
            "residual_ptr": residual,
            "mean_ptr": mean,
            "variance_ptr": variance,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "output_ptr": output,
            "eps": eps,
            **arguments,
        },
        {"ACTIVATION": activation, **sizes.constants(blocks, x)},
        num_warps=warps(blocks),
    )


def plan_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    grad_x: Tensor | None,
    sums: bool,
    products: bool,
    eps: float,
    activation: str = "identity",
) -> tuple[Launch, Tensor | None]:
    """The pass over the gradient, laid out as x.

    Args:
        grad: of the result.
        x: as in the forward pass.
        mean: likewise.
        variance: likewise.
        weight: likewise.
        grad_x: filled, if given.
        sums: whether to sum g.
        products: whether to sum g·(x − mean) too.
        eps: as in the forward pass.
        activation: likewise; without one ``grad_x`` is the gradient of x, else of its activation.

    Returns:
        The launch and the sums in parts, (2, parts, channels), fp32, which it fills, or None.
    """
    sizes = Sizes.of(x)
    blocks, parts, arguments = backward_shares(sizes)
    partial = grad.new_empty((2, parts, sizes.channels), dtype=torch.float32) if sums else None
    launch = Launch(
        kernels.backward,
        parts * arguments["channel_blocks"],
        {
            "grad_ptr": grad,
            "x_ptr": x if products else None,
            "mean_ptr": mean,
            "variance_ptr": variance,
            "weight_ptr": weight,
            "grad_x_ptr": grad_x,
            "sums_ptr": partial,
            "eps": eps,
            **arguments,
            "parts": parts,
        },
        {"ACTIVATION": activation, **sizes.constants(blocks, x)},
        # An activation's temporaries spill on 4 warps, channels last.
        num_warps=8 if sizes.last and activation != "identity" else warps(blocks),
    )
    return launch, partial


def plan_finish(
    partial: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    eps: float,
) -> Launch:
    """The vectors' gradients, fp32, each filled if given, from the sums of ``plan_backward``."""
    _, parts, channels = partial.shape
    block = min(_power_of_two(channels), 16)
    return Launch(
        kernels.finish,
        ceil_div(channels, block),
        {
            "sums_ptr": partial,
            "variance_ptr": variance,
            "weight_ptr": weight,
            "grad_mean_ptr": grad_mean,
            "grad_variance_ptr": grad_variance,
            "grad_weight_ptr": grad_weight,
            "grad_bias_ptr": grad_bias,
            "eps": eps,
            "parts": parts,
            "channels": channels,
        },
        {
            "INDEX_64": False,  # the sums are few however many the elements
            "BLOCK_PARTS": min(_power_of_two(parts), 128),
            "BLOCK_CHANNELS": block,
        },
        num_warps=4,
    )


def plan_examples(dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch, planned on meta tensors: what the compile check compiles."""
    return list(_examples(dtype))


def _examples(dtype: torch.dtype) -> Iterator[Launch]:
    """Launches of DeGMix on NYUD-v2 in both layouts, at odd and even sizes, with more than 2³¹ elements."""
    calls = [((8, 256, 107, 140), False), ((8, 256, 107, 140), True)]
    if dtype == torch.bfloat16:
        calls += [((2, 50, 7, 7), False), ((8, 256, 128, 256), False), ((3, 256, 2048, 2048), True)]
    for shape, last in calls:
        x = torch.empty(shape, dtype=dtype, device="meta")
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        vector = torch.empty(shape[1], device="meta")
        yield plan_forward(x, vector, vector, vector, vector, x, x, 1e-5)
        backward, partial = plan_backward(x, x, vector, vector, vector, x, True, True, 1e-5)
        yield backward
        yield plan_finish(partial, vector, vector, vector, vector, vector, vector, 1e-5)
