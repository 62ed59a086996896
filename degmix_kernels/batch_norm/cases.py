"""Calls of ``batch_norm``: what the contract tests run, what the compile check compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from degmix_kernels.batch_norm import reference
from degmix_kernels.batch_norm.module import BatchNorm2d
from degmix_kernels.batch_norm.op import batch_norm, op
from degmix_kernels.contract import Op, Sample, Shape

# shape of x, weight and bias, residual
_CALLS = (
    ((2, 5, 6, 9), True, True),
    ((1, 17, 5, 3), True, False),
    ((3, 16, 4, 8), False, True),
    ((11, 7), True, True),
    ((9, 40, 1, 1), False, False),
    ((1, 1, 1, 1), True, True),
    ((0, 4, 3, 5), True, True),
)


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    samples = []
    for shape, affine, residual in _CALLS:
        channels = shape[1]
        arguments = {
            "x": draw(*shape),
            "mean": draw(channels),
            "variance": draw(channels).square() + 0.5,
            "weight": draw(channels) if affine else None,
            "bias": draw(channels) if affine else None,
            "residual": draw(*shape) if residual else None,
            "eps": 1e-3,
        }
        # The gradient of a variance has 1 / √(variance + eps) to the third power, which one channel shares.
        roots = {"variance": 3} if channels == 1 else {}
        samples.append(Sample(arguments, max(arguments["x"].numel() // channels, 1), roots))
    return samples


def _shapes(dtype: torch.dtype) -> Iterator[Shape]:
    """DeGMix on NYUD-v2 in both layouts; odd and even sizes, more than 2³¹ elements."""
    calls = [((8, 256, 107, 140), False), ((8, 256, 107, 140), True)]
    if dtype == torch.bfloat16:
        calls += [((2, 50, 7, 7), False), ((8, 256, 128, 256), False), ((3, 256, 2048, 2048), True)]
    for shape, last in calls:
        x = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last if last else None)
        vectors = (torch.empty(shape[1]) for _ in range(4))
        names = ("x", "mean", "variance", "weight", "bias", "residual")
        yield Shape(dict(zip(names, (x, *vectors, torch.empty_like(x)), strict=True)))


OPS = (
    Op(
        op=op,
        function=batch_norm,
        reference=reference.batch_norm,
        module=BatchNorm2d,
        samples=_samples,
        shapes=_shapes,
        batched=("x", "residual"),
        keeps_layout_of="x",
        backward_reads=("x", "mean", "variance", "weight"),
    ),
)
