"""One call of ``deform_conv2d``: its tensors, and every size that follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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


@dataclass(eq=False)
class Problem:
    """One call: its tensors, shaped as in :func:`degmix_kernels.deform_conv2d`, its geometry, its sizes.

    Pairs are (vertical, horizontal). Tensors may be meta tensors: nothing here touches memory. Sizes are
    plain attributes, computed at once: a launch reads most of them several times.

    Attributes:
        batch: images.
        channels: input channels.
        group_channels: input channels per group of the convolution.
        groups: groups of the convolution.
        group_out: output channels per group of the convolution.
        taps: of the kernel.
        offset_groups: blocks of input channels that share their offsets.
        offset_channels: input channels per offset group.
        segment: the largest block of channels that never straddles a group or an offset group.
        out_pixels: output pixels of one image.
        columns: elements of the column buffer that a convolution by im2col would allocate.
    """

    input: Tensor
    offset: Tensor
    weight: Tensor
    mask: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def __post_init__(self) -> None:
        self.batch, self.channels, self.height, self.width = self.input.shape
        out_channels, self.group_channels, kernel_height, self.kernel_width = self.weight.shape
        self.groups = self.channels // self.group_channels
        self.group_out = out_channels // self.groups
        self.taps = kernel_height * self.kernel_width
        _, offset_maps, out_height, self.out_width = self.offset.shape
        self.offset_groups = offset_maps // (2 * self.taps)
        self.offset_channels = self.channels // self.offset_groups
        self.segment = math.gcd(self.group_channels, self.offset_channels)
        self.out_pixels = out_height * self.out_width
        self.columns = self.batch * self.channels * self.taps * self.out_pixels

    @classmethod
    def of(
        cls, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, geometry: Sequence[int]
    ) -> Problem:
        """A call with the weight as kernels read it; ``geometry``: stride, padding, dilation, each (y, x)."""
        # Taps last: neighbouring channels of the weight are then neighbours in memory.
        weight = weight.contiguous(memory_format=torch.channels_last)
        return cls(input, offset, weight, mask, geometry[0:2], geometry[2:4], geometry[4:6])

    def sizes(self) -> dict[str, int]:
        """The run-time sizes every kernel takes, by argument name."""
        return {
            "groups": self.groups,
            "group_channels": self.group_channels,
            "group_out": self.group_out,
            "offset_channels": self.offset_channels,
            "height": self.height,
            "width": self.width,
            "taps": self.taps,
            "kernel_width": self.kernel_width,
            "out_width": self.out_width,
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
