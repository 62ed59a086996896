"""Calls of the gate and the gated MLP: what the contract tests run, what the compile check compiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from degmix_kernels.contract import Op, Sample, Shape
from degmix_kernels.gating import reference
from degmix_kernels.gating.mlp_op import gated_mlp
from degmix_kernels.gating.mlp_op import op as mlp_op
from degmix_kernels.gating.module import GatedMLP, SpatialGatingUnit
from degmix_kernels.gating.unit_op import op as unit_op
from degmix_kernels.gating.unit_op import spatial_gating_unit

# batch, tokens, channels, hidden, mode. A LayerNorm of very few channels now and then divides by next to
# nothing, which magnifies every rounding before it beyond what the tolerance allows for.
_CALLS = (
    (2, 9, 26, 22, "channel"),
    (1, 5, 23, 37, "token"),
    (3, 1, 18, 27, "channel"),
    (2, 7, 39, 25, "token"),
    (0, 4, 4, 5, "channel"),
    (2, 0, 6, 4, "channel"),
    (2, 0, 6, 4, "token"),
)
# The same of what is compiled.
_DEGMIX = (32, 107 * 140, 256, 256, "channel")  # batch 8, four tasks, NYUD-v2
_GMLP = (64, 196, 192, 384, "token")
_MORE = (
    (2, 49, 50, 70, "channel"),
    (1, 60, 40, 5000, "channel"),  # rows wider than a tile
    (32, 640 * 640, 256, 256, "channel"),  # more than 2³¹ elements
    (16, 8192, 256, 16384, "token"),
)


def _draw(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype).to(device)


def _unit_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    draw = _draw(device, dtype, generator)
    samples = []
    for batch, tokens, channels, _, mode in _CALLS:
        size = channels if mode == "channel" else tokens
        arguments: dict[str, Tensor | str] = {
            "u": draw(batch, tokens, channels),
            "v": draw(batch, tokens, channels),
            "norm_weight": draw(channels),
            "norm_bias": draw(channels),
            "weight": draw(size, size) / size**0.5,
            "bias": draw(size),
            "mode": mode,
        }
        # In succession: of the LayerNorm, of the gate's product, over tokens of the parameters' gradients.
        samples.append(Sample(arguments, channels + size + batch * tokens))
    return samples


def _mlp_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    draw = _draw(device, dtype, generator)
    samples = []
    for batch, tokens, channels, hidden, mode in _CALLS:
        size = hidden if mode == "channel" else tokens
        arguments: dict[str, Tensor | str | bool] = {
            "x": draw(batch, tokens, channels),
            "norm_weight": draw(channels),
            "norm_bias": draw(channels),
            "fc1_weight": draw(2 * hidden, channels) / channels**0.5,
            "fc1_bias": draw(2 * hidden),
            "gate_norm_weight": draw(hidden),
            "gate_norm_bias": draw(hidden),
            "gate_weight": draw(size, size) / size**0.5,
            "gate_bias": draw(size),
            "fc2_weight": draw(channels, hidden) / hidden**0.5,
            "fc2_bias": draw(channels),
            "mode": mode,
            "recompute": tokens == 7,
        }
        # In succession: of a LayerNorm and fc1, of another and the gate, of fc2; over tokens of gradients.
        samples.append(Sample(arguments, 2 * channels + size + 2 * hidden + batch * tokens))
    return samples


def _unit_shapes(dtype: torch.dtype) -> Iterator[Shape]:
    """u and v as halves of one tensor, as in ``gated_mlp``, which has the same kernels at more sizes."""
    for batch, tokens, _, channels, mode in (_DEGMIX, _GMLP):
        size = channels if mode == "channel" else tokens
        u, v = torch.empty(batch, tokens, 2 * channels, dtype=dtype).chunk(2, dim=2)
        yield Shape(
            {
                "u": u,
                "v": v,
                "norm_weight": torch.empty(channels),
                "norm_bias": torch.empty(channels),
                "weight": torch.empty(size, size, dtype=dtype),
                "bias": torch.empty(size, dtype=dtype),
                "mode": mode,
            }
        )


def _mlp_shapes(dtype: torch.dtype) -> Iterator[Shape]:
    calls = [_DEGMIX, _GMLP]
    if dtype == torch.float16:  # the code of bf16 but for conversions
        calls = [_DEGMIX]
    if dtype == torch.bfloat16:
        calls += _MORE
    for (batch, tokens, channels, hidden, mode), recompute in itertools.product(calls, (False, True)):
        size = hidden if mode == "channel" else tokens
        yield Shape(
            {
                "x": torch.empty(batch, tokens, channels, dtype=dtype),
                "norm_weight": torch.empty(channels),
                "norm_bias": torch.empty(channels),
                "fc1_weight": torch.empty(2 * hidden, channels, dtype=dtype),
                "fc1_bias": torch.empty(2 * hidden, dtype=dtype),
                "gate_norm_weight": torch.empty(hidden),
                "gate_norm_bias": torch.empty(hidden),
                "gate_weight": torch.empty(size, size, dtype=dtype),
                "gate_bias": torch.empty(size, dtype=dtype),
                "fc2_weight": torch.empty(channels, hidden, dtype=dtype),
                "fc2_bias": torch.empty(channels, dtype=dtype),
                "mode": mode,
                "recompute": recompute,
            }
        )


OPS = (
    Op(
        op=unit_op,
        function=spatial_gating_unit,
        reference=reference.spatial_gating_unit,
        module=SpatialGatingUnit,
        samples=_unit_samples,
        shapes=_unit_shapes,
        batched=("u", "v"),
        backward_reads=("u", "v", "norm_weight", "norm_bias", "weight", "bias"),
    ),
    Op(
        op=mlp_op,
        function=gated_mlp,
        reference=reference.gated_mlp,
        module=GatedMLP,
        samples=_mlp_samples,
        shapes=_mlp_shapes,
        batched=("x",),
        backward_reads=mlp_op.differentiable[:-1],  # all but fc2's bias
    ),
)
