"""What several tests of deformable convolution start from."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64


def draw(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in shapes]


def gradients(output: Tensor, inputs: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output, [each for each in inputs if each is not None], grad))


def per_channel_call(
    device: torch.device, dtype: torch.dtype = torch.float32, batch: int = 2, channels: int = 3
) -> dict[str, Tensor]:
    """Arguments of a small per-channel call: 5×6 maps, 4 out channels."""
    shapes = {
        "input": (batch, channels, 5, 6),
        "offset": (batch, 2 * channels, 5, 6),
        "weight": (4, channels, 1, 1),
        "bias": (4,),
        "mask": (batch, channels, 5, 6),
    }
    values = draw(3, *shapes.values(), dtype=dtype)
    return {name: value.to(device) for name, value in zip(shapes, values, strict=True)}
