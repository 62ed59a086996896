"""Calls of ``linear_norm``: what the contract tests run, what the compile check compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from degmix_kernels.contract import Op, Sample, Shape
from degmix_kernels.linear_norm import reference
from degmix_kernels.linear_norm.module import LinearNorm
from degmix_kernels.linear_norm.op import linear_norm, op, result_shape

# shape of x, blocks of parameters or none, out channels, bias, addend, residual
_CALLS = (
    ((2, 5, 6, 9), (), 7, True, True, True),
    ((2, 9, 10), (), 6, True, False, True),
    ((3, 1, 17), (), 33, False, True, False),
    ((4, 5, 7), (2,), 6, True, True, True),
    ((3, 4, 16), (3,), 16, False, False, True),
    ((1, 16, 1, 3), (), 16, True, False, False),
    ((0, 4, 3, 5), (), 2, True, True, True),
)


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    samples = []
    for shape, blocks, out, bias, addend, residual in _CALLS:
        x, channels = draw(*shape), shape[1 if len(shape) == 4 else 2]
        result = result_shape(x, out)
        arguments = {
            "x": x,
            "weight": draw(*blocks, out, channels) / channels**0.5,
            "bias": draw(*blocks, out) if bias else None,
            "norm_weight": draw(*blocks, out),
            "norm_bias": draw(*blocks, out),
            "addend": draw(*result) if addend else None,
            "residual": draw(*result) if residual else None,
        }
        pixels = x.numel() // channels
        # In succession: of the product, of the LayerNorm, over pixels of the parameters' gradients.
        samples.append(Sample(arguments, channels + out + pixels))
    return samples


def _shapes(dtype: torch.dtype) -> Iterator[Shape]:
    """DeGMix's embedding (maps) and blocks (tokens) on NYUD-v2, ragged sizes, more than 2³¹ elements."""
    # shape of x, out channels; maps are also tried with channels last
    calls = [((8, 96, 107, 140), 256), ((1, 4 * 8 * 14980, 256), 256), ((4, 8 * 14980, 512), 256)]
    if dtype == torch.bfloat16:
        calls += [((2, 50, 7, 7), 27), ((1, 1000, 384), 512), ((3, 256, 2048, 2048), 256)]
    for shape, out in calls:
        is_map = len(shape) == 4
        vector = (out,) if is_map else (shape[0], out)
        for layout in (torch.contiguous_format, torch.channels_last)[: 2 if is_map else 1]:
            x = torch.empty(shape, dtype=dtype, memory_format=layout)
            arguments = {
                "x": x,
                "weight": torch.empty(*vector, shape[1 if is_map else 2], dtype=dtype),
                "bias": torch.empty(vector, dtype=dtype),
                "norm_weight": torch.empty(vector),
                "norm_bias": torch.empty(vector),
            }
            result = torch.empty(result_shape(x, out), dtype=dtype, memory_format=layout)
            yield Shape(arguments | {"addend": result, "residual": torch.empty_like(result)})


OPS = (
    Op(
        op=op,
        function=linear_norm,
        reference=reference.linear_norm,
        module=LinearNorm,
        samples=_samples,
        shapes=_shapes,
        batched=("x", "addend", "residual"),
        backward_reads=("x", "weight", "bias", "norm_weight", "addend"),
        output=lambda arguments: result_shape(arguments["x"], arguments["weight"].shape[-2]),
        keeps_layout_of="x",
    ),
)
