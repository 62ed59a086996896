"""Calls of ``deform_conv2d`` and ``deform_mix``: what the contract tests run, what is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from degmix_kernels.contract import Op, Sample, Shape
from degmix_kernels.deform_conv import reference
from degmix_kernels.deform_conv.mix_op import deform_mix, mix_op
from degmix_kernels.deform_conv.module import DeformConv2d, DeformMix
from degmix_kernels.deform_conv.op import conv_op, deform_conv2d


@dataclass(frozen=True)
class _Case:
    """One call, in sizes; pairs are (vertical, horizontal), ``wild`` scales the offsets, in pixels."""

    batch: int
    channels: int
    out_channels: int
    height: int
    width: int
    kernel: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    mask: bool = True
    bias: bool = True
    wild: float = 2.0

    def sample(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        out_height, out_width = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, padding, dilation, kernel, stride in zip(
                (self.height, self.width), self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        sampled = self.offset_groups * self.kernel[0] * self.kernel[1]
        group_channels = self.channels // self.groups
        arguments = {
            "input": draw(self.batch, self.channels, self.height, self.width),
            "offset": draw(self.batch, 2 * sampled, out_height, out_width) * self.wild,
            "weight": draw(self.out_channels, group_channels, *self.kernel),
            "bias": draw(self.out_channels) if self.bias else None,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "mask": draw(self.batch, sampled, out_height, out_width) if self.mask else None,
        }
        # The weight gradient sums over batch and pixels, the output over channels and taps.
        pixels, columns = self.batch * out_height * out_width, group_channels * sampled // self.offset_groups
        return Sample(arguments, max(pixels, columns, self.out_channels))


# The first of each is the quickest: many tests take no other.
_PER_CHANNEL = (
    _Case(2, 4, 3, 3, 4, offset_groups=4),
    _Case(2, 5, 7, 6, 9, offset_groups=5),
    _Case(1, 17, 3, 5, 3, offset_groups=17, stride=(2, 1), padding=(1, 2), mask=False, bias=False, wild=30),
    _Case(2, 6, 4, 4, 7, groups=2, offset_groups=6, bias=False, wild=1),
    _Case(1, 1, 1, 1, 1, mask=False, wild=0.5),
    _Case(0, 4, 3, 5, 6, offset_groups=4),
)
_SMALL_GROUPS = (
    _Case(2, 6, 4, 3, 4, (2, 1), 2, 3, (1, 2), (1, 0)),
    _Case(2, 6, 4, 4, 5, (3, 2), 2, 3, (2, 1), (1, 0), (2, 1)),  # torchvision's own test
    _Case(1, 5, 5, 3, 4, (3, 3), groups=5, offset_groups=1, padding=(1, 1), mask=False, wild=30),  # depthwise
    _Case(1, 24, 3, 4, 3, (1, 2), offset_groups=2, bias=False),
    _Case(0, 6, 4, 4, 5, (3, 2), 2, 3, padding=(1, 0)),
)
_GENERAL = (
    _Case(2, 32, 4, 3, 4, (1, 2), groups=2, padding=(0, 1)),
    _Case(2, 32, 6, 4, 5, (2, 3), groups=2, offset_groups=1, padding=(1, 1), dilation=(1, 2)),
    _Case(1, 51, 20, 5, 3, (1, 3), offset_groups=3, stride=(2, 1), padding=(1, 1), mask=False, wild=30),
    _Case(1, 16, 1, 1, 1, bias=False),
    _Case(0, 16, 3, 4, 4, (3, 3)),
)


def _samples(cases: tuple[_Case, ...]) -> Callable[..., list[Sample]]:
    def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
        return [case.sample(device, dtype, generator) for case in cases]

    return samples


def _mix_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for case in _PER_CHANNEL:
        if case.stride == (1, 1):
            sample = case.sample(device, dtype, generator)
            arguments = {name: sample.arguments[name] for name in ("offset", "weight", "bias")}
            samples.append(Sample(arguments | {"x": sample.arguments["input"]}, sample.reduction))
    return samples


@dataclass(frozen=True)
class _Shape:
    """A call worth compiling: 3×3 with padding, or 1×1.

    ``last``: all maps are channels_last, and offsets as narrow as the input. ``input_last``: the input is
    channels_last, and offsets are fp32, as they are otherwise.
    """

    shape: tuple[int, int, int, int]
    out: int
    offset_groups: int
    groups: int = 1
    kernel: int = 3
    mask: bool = False
    bias: bool = True
    last: bool = False
    input_last: bool = False
    deterministic: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)

    def call(self, dtype: torch.dtype) -> Shape:
        def empty(*shape: int, of: torch.dtype = dtype, last: bool = self.last) -> Tensor:
            memory_format = torch.channels_last if last else torch.contiguous_format
            return torch.empty(shape, dtype=of, memory_format=memory_format)

        batch, channels, height, width = self.shape
        points, narrow = self.offset_groups * self.kernel**2, self.last and not self.input_last
        arguments = {
            "input": empty(*self.shape, last=self.last or self.input_last),
            "offset": empty(batch, 2 * points, height, width, of=dtype if narrow else torch.float32),
            "weight": empty(self.out, channels // self.groups, self.kernel, self.kernel, last=False),
            "bias": torch.empty(self.out, dtype=dtype) if self.bias else None,
            "padding": self.kernel // 2,
            "mask": empty(batch, points, height, width) if self.mask else None,
        }
        return Shape(arguments, self.deterministic)


_BF16 = (torch.bfloat16,)
_NOT_BF16 = (torch.float32, torch.float16)
_SHAPES = {
    "general": (
        _Shape((32, 256, 56, 56), 256, 1, mask=True, input_last=True),
        _Shape((2, 64, 200, 200), 64, 1, last=True, input_last=True),
        # A ragged call, and more than 2³¹ elements.
        _Shape((2, 72, 28, 28), 72, 2, mask=True, input_last=True, dtypes=_BF16),
        _Shape((1, 256, 4096, 4096), 256, 1, input_last=True, dtypes=_BF16),
        _Shape((1, 256, 4096, 4096), 256, 1, input_last=True, deterministic=True, dtypes=_BF16),
        # Groups and offset groups side by side.
        _Shape((2, 96, 56, 56), 192, 3, 2, mask=True, last=True, input_last=True, dtypes=_NOT_BF16),
        _Shape(
            (2, 96, 56, 56),
            192,
            3,
            2,
            mask=True,
            last=True,
            input_last=True,
            deterministic=True,
            dtypes=_NOT_BF16,
        ),
    ),
    "per channel": (
        _Shape((8, 256, 107, 140), 256, 256, kernel=1, bias=False, deterministic=True),
        _Shape((2, 96, 56, 56), 96, 96, 2, kernel=1, mask=True, last=True),
        _Shape((1, 256, 2048, 4096), 256, 256, kernel=1, bias=False, dtypes=_BF16),  # more than 2³¹ elements
    ),
    "small groups": (
        # EDVR, BasicVSR++: 8 channels per offset group; depthwise.
        _Shape((2, 64, 180, 320), 64, 8, mask=True, last=True),
        _Shape((2, 128, 64, 64), 64, 16, bias=False),
        _Shape((4, 96, 56, 56), 96, 1, 96, bias=False),
    ),
}


def _shapes(path: str) -> Callable[[torch.dtype], Iterator[Shape]]:
    return lambda dtype: (shape.call(dtype) for shape in _SHAPES[path] if dtype in shape.dtypes)


def _mix_shapes(dtype: torch.dtype) -> Iterator[Shape]:
    """DeGMix on NYUD-v2, and on PASCAL-Context, whose sizes are multiples of 16; four tasks side by side."""
    # shape of x, groups, statistics
    calls = [((8, 256, 107, 140), 1, True)]
    if dtype != torch.float32:
        calls += [((8, 256, 107, 140), 1, False)]
    if dtype == torch.bfloat16:
        calls += [((8, 256, 128, 128), 1, False)]
    if dtype != torch.float16:  # the code of bf16 but for conversions
        calls += [((1, 1024, 107, 140), 4, True)]
    for (batch, channels, height, width), groups, statistics in calls:
        arguments = {
            "x": torch.empty(batch, channels, height, width, dtype=dtype),
            "offset": torch.empty(batch, 2 * channels, height, width),
            "weight": torch.empty(channels, channels // groups, 1, 1, dtype=dtype),
            "bias": torch.empty(channels, dtype=dtype),
            "statistics": statistics,
        }
        yield Shape(arguments)


def _output(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    offset = arguments["offset"]
    return (offset.shape[0], arguments["weight"].shape[0], *offset.shape[2:])


def _deform_conv2d(variant: str, cases: tuple[_Case, ...]) -> Op:
    return Op(
        op=conv_op,
        function=deform_conv2d,
        reference=reference.deform_conv2d,
        module=DeformConv2d,
        samples=_samples(cases),
        shapes=_shapes(variant),
        batched=("input", "offset", "mask"),
        backward_reads=("input", "offset", "weight", "mask"),
        output=_output,
        keeps_layout_of="input",
        variant=variant,
    )


OPS = (
    _deform_conv2d("general", _GENERAL),
    _deform_conv2d("per channel", _PER_CHANNEL),
    _deform_conv2d("small groups", _SMALL_GROUPS),
    Op(
        op=mix_op,
        function=deform_mix,
        reference=reference.deform_mix,
        module=DeformMix,
        samples=_mix_samples,
        shapes=_mix_shapes,
        batched=("x", "offset"),
        backward_reads=("x", "offset", "weight", "bias"),  # behind the activation, the bias too
        output=_output,
        keeps_layout_of="x",
    ),
)
