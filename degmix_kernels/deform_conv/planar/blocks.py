"""Tiles of the planar plans: block sizes, groups that share programs, and what kernels must be told of them.

The kernels' own view of a tile is ``tiles``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from degmix_kernels import maps
from degmix_kernels.deform_conv.problem import Problem
from degmix_kernels.launch import needs_64_bit
from degmix_kernels.maps import block_of, ceil_div
from degmix_kernels.product import precision

# A span of groups larger than this shares no tiles: its block diagonal products would be mostly zeros.
LARGEST_SPAN = 32


@dataclass(frozen=True)
class Blocks:
    """Block sizes of a launch."""

    out: int
    groups: int
    within: int
    pixels: int

    @property
    def rows(self) -> int:
        """Channels of a tile."""
        return self.groups * self.within

    def constants(self, problem: Problem) -> dict[str, Any]:
        """The kernel's constants that follow."""
        return {
            "PACKED": self.within == problem.offset_channels,
            "BLOCK_OUT": self.out,
            "BLOCK_GROUPS": self.groups,
            "BLOCK_WITHIN": self.within,
            "BLOCK_PIXELS": self.pixels,
        }


def touched(length: int, step: int, size: int) -> int:
    """The most blocks of ``size`` that ``length`` elements meet, starting at a multiple of ``step``."""
    return (size - math.gcd(step, size) + length - 1) // size + 1


def tile(problem: Problem, rows: int) -> tuple[int, int]:
    """Offset groups and channels of each in a tile of ``rows``; padding takes less than half of it."""
    within = block_of(problem.offset_channels, rows, smallest=1)
    return rows // within, within


def fits(problem: Problem, rows: int) -> bool:
    """Whether tiles of so many rows in all waste no more than half, or half of one product."""
    return rows <= 2 * max(problem.channels, 16)


@dataclass(frozen=True)
class Span:
    """Groups of the convolution that share the programs of the forward pass and of the weight gradient.

    One group if it has 16 channels, else as many as it takes to fill a tile: whole offset groups of them, if
    that is possible; but if tiles of 16 channels would stay mostly empty so, as many as fill them best.
    """

    groups: int
    count: int
    channels: int

    @classmethod
    def of(cls, problem: Problem, largest_out: int) -> Span:
        group = problem.group_channels
        unit = math.lcm(group, problem.offset_channels)
        unit = unit if unit <= LARGEST_SPAN else group
        wanted = unit * ceil_div(16, unit) // group if group < 16 else 1
        most = max(1, min(problem.groups, largest_out // problem.group_out))
        span = cls._with(problem, min(wanted, most))
        if fits(problem, span.rows(problem, 16)):
            return span
        sizes = range(1, min(most, ceil_div(4 * LARGEST_SPAN, group)) + 1)
        return min((cls._with(problem, groups) for groups in sizes), key=lambda each: each.rows(problem, 16))

    @classmethod
    def _with(cls, problem: Problem, groups: int) -> Span:
        return cls(groups, ceil_div(problem.groups, groups), groups * problem.group_channels)

    def rows(self, problem: Problem, of_a_tile: int) -> int:
        """Rows of all tiles of all spans, padding included."""
        sets, steps = self.tiles(problem, Blocks(0, *tile(problem, of_a_tile), 0))
        return self.count * sets * steps * of_a_tile

    def tiles(self, problem: Problem, blocks: Blocks) -> tuple[int, int]:
        """Tiles of a span: sets of offset groups, and blocks of channels within one."""
        offset_groups = touched(self.channels, self.channels, problem.offset_channels)
        sets = ceil_div(min(problem.offset_groups, offset_groups), blocks.groups)
        within = min(self.channels, problem.offset_channels)
        return sets, 1 if blocks.groups > 1 else ceil_div(within, blocks.within)


def layouts(problem: Problem, output: Tensor) -> dict[str, Any]:
    """The constants that tell the kernels what the tensors look like."""
    mask = problem.mask

    def image(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:1]

    return {
        "INPUT_LAST": maps.is_channels_last(problem.input),
        "OFFSET_LAST": maps.is_channels_last(problem.offset),
        "MASK_LAST": mask is not None and maps.is_channels_last(mask),
        "OUTPUT_LAST": maps.is_channels_last(output),
        "PRECISION": precision(problem.input.dtype),
        # Kernels add the image's own start, in 64 bits always.
        "INDEX_64": needs_64_bit(
            *(image(tensor) for tensor in (problem.input, problem.offset, mask, output))
        ),
    }


def warps(elements: int, of_a_warp: int) -> int:
    """Warps for a tile: 4 to 16, on AMD half as many, of twice the lanes."""
    count = max(4, min(16, elements // of_a_warp))
    return count // 2 if torch.version.hip else count
