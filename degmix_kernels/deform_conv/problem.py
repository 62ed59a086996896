"""One call of ``deform_conv2d``: its tensors, and every size that follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from degmix_kernels.maps import ceil_div

# Programs of a weight gradient that keep a GPU busy. Not the GPU's own number of multiprocessors: sums
# would then differ between GPUs.
WEIGHT_PROGRAMS = 512
# Temporary tensors take at most 1/20 of the column buffer that the op does without: these shares of it go to
# a part of the batch that is copied or summed in fp32, and to the partial sums of the weight gradient.
PART_SHARE = 1 / 32
WEIGHT_SHARE = 1 / 64
# Partial sums may always take this many bytes: a 1×1 kernel has few columns, and a GPU wants to be busy.
WEIGHT_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Problem:
    """The tensors of one call, shaped as in :func:`degmix_kernels.deform_conv2d`, and its geometry.

    Pairs are (vertical, horizontal). Tensors may be meta tensors: nothing here touches memory.
    """

    input: Tensor
    offset: Tensor
    weight: Tensor
    mask: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(
        cls, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, geometry: Sequence[int]
    ) -> Problem:
        """A call with the weight as kernels read it; ``geometry``: stride, padding, dilation, each (y, x)."""
        # Taps last: neighbouring channels of the weight are then neighbours in memory.
        weight = weight.contiguous(memory_format=torch.channels_last)
        return cls(input, offset, weight, mask, geometry[0:2], geometry[2:4], geometry[4:6])

    @cached_property
    def batch(self) -> int:
        """Images."""
        return self.input.shape[0]

    @cached_property
    def channels(self) -> int:
        """Input channels."""
        return self.input.shape[1]

    @cached_property
    def group_channels(self) -> int:
        """Input channels per group of the convolution."""
        return self.weight.shape[1]

    @cached_property
    def groups(self) -> int:
        """Groups of the convolution."""
        return self.channels // self.group_channels

    @cached_property
    def group_out(self) -> int:
        """Output channels per group of the convolution."""
        return self.weight.shape[0] // self.groups

    @cached_property
    def taps(self) -> int:
        """Kernel taps."""
        return self.weight.shape[2] * self.weight.shape[3]

    @cached_property
    def offset_groups(self) -> int:
        """Blocks of input channels that share their offsets."""
        return self.offset.shape[1] // (2 * self.taps)

    @cached_property
    def offset_channels(self) -> int:
        """Input channels per offset group."""
        return self.channels // self.offset_groups

    @cached_property
    def segment(self) -> int:
        """The largest block of channels that never straddles a group or an offset group."""
        return math.gcd(self.group_channels, self.offset_channels)

    @cached_property
    def out_pixels(self) -> int:
        """Output pixels of one image."""
        return self.offset.shape[2] * self.offset.shape[3]

    @cached_property
    def columns(self) -> int:
        """Elements of the column buffer that a convolution by im2col would allocate."""
        return self.batch * self.channels * self.taps * self.out_pixels

    def sizes(self) -> dict[str, int]:
        """The run-time sizes every kernel takes, by argument name."""
        return {
            "groups": self.groups,
            "group_channels": self.group_channels,
            "group_out": self.group_out,
            "offset_channels": self.offset_channels,
            "height": self.input.shape[2],
            "width": self.input.shape[3],
            "taps": self.taps,
            "kernel_width": self.weight.shape[3],
            "out_width": self.offset.shape[3],
            "out_pixels": self.out_pixels,
            "stride_y": self.stride[0],
            "stride_x": self.stride[1],
            "padding_y": self.padding[0],
            "padding_x": self.padding[1],
            "dilation_y": self.dilation[0],
            "dilation_x": self.dilation[1],
        }

    def images(self, start: int, stop: int) -> Problem:
        """The same call on the images from ``start`` up to ``stop``; views, no copies."""
        return replace(
            self,
            input=self.input[start:stop],
            offset=self.offset[start:stop],
            mask=None if self.mask is None else self.mask[start:stop],
        )

    def weight_splits(self, programs: int) -> int:
        """Into how many shares of the pixels a weight gradient of ``programs`` programs each is split.

        Enough to keep a GPU busy, as long as there is a block of pixels for each, and the fp32 partial sums
        stay small beside the column buffer.
        """
        busy = min(ceil_div(WEIGHT_PROGRAMS, programs), ceil_div(self.batch * self.out_pixels, 32))
        bytes_of_one = self.weight.numel() * 4
        small = WEIGHT_SHARE * self.columns * self.input.element_size()
        small = int(max(small, WEIGHT_BYTES) / bytes_of_one)
        return max(1, min(busy, small))
