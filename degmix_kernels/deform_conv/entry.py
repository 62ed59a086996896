"""What the registry knows of deformable convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import backend
from degmix_kernels.contract import Op, Sample
from degmix_kernels.deform_conv import reference
from degmix_kernels.deform_conv.module import DeformConv2d, DeformMix
from degmix_kernels.deform_conv.op import deform_conv2d, deform_mix
from degmix_kernels.launch import Launch

# batch, channels, out_channels, groups, height, width, stride, padding, mask, bias, offset scale in pixels
_PER_CHANNEL_SHAPES = (
    (2, 5, 7, 1, 6, 9, 1, 0, True, True, 2.0),
    (1, 17, 3, 1, 5, 3, (2, 1), (1, 2), False, False, 30.0),
    (2, 6, 4, 2, 4, 7, 1, 0, True, False, 1.0),
    (1, 1, 1, 1, 1, 1, 1, 0, False, True, 0.5),
    (0, 4, 3, 1, 5, 6, 1, 0, True, True, 1.0),
)


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    samples = []
    for (
        batch,
        channels,
        out,
        groups,
        height,
        width,
        stride,
        padding,
        mask,
        bias,
        scale,
    ) in _PER_CHANNEL_SHAPES:
        step, margin = reference.as_pair(stride), reference.as_pair(padding)
        out_height = (height + 2 * margin[0] - 1) // step[0] + 1
        out_width = (width + 2 * margin[1] - 1) // step[1] + 1
        offset = draw(batch, 2 * channels, out_height, out_width) * scale
        arguments = {
            "input": draw(batch, channels, height, width),
            "offset": offset,
            "weight": draw(out, channels // groups, 1, 1),
            "bias": draw(out) if bias else None,
            "stride": stride,
            "padding": padding,
            "mask": draw(batch, channels, out_height, out_width) if mask else None,
        }
        # The weight gradient sums over batch and pixels, the output over channels.
        samples.append(Sample(arguments, max(batch * out_height * out_width, channels, out)))
    return samples


def _mix_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for sample in _samples(device, dtype, generator):
        given = sample.arguments
        if (
            given["stride"] == 1
            and given["padding"] == 0
            and given["weight"].shape[1] == given["input"].shape[1]
        ):
            arguments = {name: given[name] for name in ("offset", "weight", "bias")} | {"x": given["input"]}
            samples.append(Sample(arguments, sample.reduction))
    return samples


def plan_kernels(dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch of the per-channel path, on meta tensors; none where Triton is not installed."""
    if not backend.HAS_TRITON:
        return []
    from degmix_kernels.deform_conv.per_channel import plan_examples

    return plan_examples(dtype)


OPS = (
    Op(
        name="deform_conv2d",
        function=deform_conv2d,
        reference=reference.deform_conv2d,
        module=DeformConv2d,
        samples=_samples,
        differentiable=("input", "offset", "weight", "bias", "mask"),
        batched=("input", "offset", "mask"),
        keeps_layout_of="input",
        autocast=("input", "weight", "bias", "mask"),
        kernels=plan_kernels,
    ),
    Op(
        name="deform_mix",
        function=deform_mix,
        reference=reference.deform_mix,
        module=DeformMix,
        samples=_mix_samples,
        differentiable=("x", "offset", "weight", "bias"),
        batched=("x", "offset"),
        keeps_layout_of="x",
        autocast=("x", "weight", "bias"),
        kernels=plan_kernels,
    ),
)
