"""What the registry knows of deformable convolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from degmix_kernels import backend
from degmix_kernels.contract import Sample
from degmix_kernels.contract_old import Cost, Op
from degmix_kernels.deform_conv import reference
from degmix_kernels.deform_conv.module import DeformConv2d, DeformMix
from degmix_kernels.deform_conv.op import deform_conv2d, deform_mix
from degmix_kernels.launch import Launch


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


_PER_CHANNEL = (
    _Case(2, 5, 7, 6, 9, offset_groups=5),
    _Case(1, 17, 3, 5, 3, offset_groups=17, stride=(2, 1), padding=(1, 2), mask=False, bias=False, wild=30),
    _Case(2, 6, 4, 4, 7, groups=2, offset_groups=6, bias=False, wild=1),
    _Case(1, 1, 1, 1, 1, mask=False, wild=0.5),
    _Case(0, 4, 3, 5, 6, offset_groups=4),
)
_SMALL_GROUPS = (
    _Case(2, 6, 4, 4, 5, (3, 2), 2, 3, (2, 1), (1, 0), (2, 1)),  # torchvision's own test
    _Case(1, 5, 5, 3, 4, (3, 3), groups=5, offset_groups=1, padding=(1, 1), mask=False, wild=30),  # depthwise
    _Case(1, 24, 3, 4, 3, (1, 2), offset_groups=2, bias=False),
    _Case(0, 6, 4, 4, 5, (3, 2), 2, 3, padding=(1, 0)),
)
_GENERAL = (
    _Case(2, 32, 6, 4, 5, (2, 3), groups=2, offset_groups=1, padding=(1, 1), dilation=(1, 2)),
    _Case(1, 51, 20, 5, 3, (3, 3), offset_groups=3, stride=(2, 1), padding=(1, 1), mask=False, wild=30),
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


def _plan_planar(dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch of the planar kernels, on meta tensors; none where Triton is not installed."""
    if not backend.HAS_TRITON:
        return []
    from degmix_kernels.deform_conv.planar import plan_examples

    return plan_examples(dtype)


def _plan_general(dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch of the general kernels, on meta tensors; none where Triton is not installed."""
    if not backend.HAS_TRITON:
        return []
    from degmix_kernels.deform_conv.general import plan_examples

    return plan_examples(dtype)


def _cost(backward_reads: tuple[str, ...]) -> Cost:
    def output(arguments: Mapping[str, Any]) -> tuple[int, ...]:
        offset = arguments["offset"]
        return (offset.shape[0], arguments["weight"].shape[0], *offset.shape[2:])

    def products(arguments: Mapping[str, Any]) -> int:
        """2 · pixels · Cout · C/groups · kh · kw: W times the samples; blending them is no product."""
        offset = arguments["offset"]
        return 2 * offset.shape[0] * math.prod(offset.shape[2:]) * arguments["weight"].numel()

    return Cost(output, products, backward_products=2, backward_reads=backward_reads)


def _deform_conv2d(variant: str, cases: tuple[_Case, ...], kernels: Callable[..., list[Launch]]) -> Op:
    return Op(
        name="deform_conv2d",
        function=deform_conv2d,
        reference=reference.deform_conv2d,
        module=DeformConv2d,
        samples=_samples(cases),
        differentiable=("input", "offset", "weight", "bias", "mask"),
        cost=_cost(("input", "offset", "weight", "mask")),
        batched=("input", "offset", "mask"),
        keeps_layout_of="input",
        autocast=("input", "weight", "bias", "mask"),
        kernels=kernels,
        variant=variant,
    )


OPS = (
    _deform_conv2d("general", _GENERAL, _plan_general),
    _deform_conv2d("per channel", _PER_CHANNEL, _plan_planar),
    _deform_conv2d("small groups", _SMALL_GROUPS, _plan_planar),
    Op(
        name="deform_mix",
        function=deform_mix,
        reference=reference.deform_mix,
        module=DeformMix,
        samples=_mix_samples,
        differentiable=("x", "offset", "weight", "bias"),
        cost=_cost(("x", "offset", "weight", "bias")),  # behind the activation, the bias too
        batched=("x", "offset"),
        keeps_layout_of="x",
        autocast=("x", "weight", "bias"),
        kernels=_plan_planar,
    ),
)
