"""What the registry knows of gating."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import backend
from degmix_kernels.contract import Op, Sample
from degmix_kernels.gating import reference
from degmix_kernels.gating.module import GatedMLP, SpatialGatingUnit
from degmix_kernels.gating.op import gated_mlp, spatial_gating_unit
from degmix_kernels.launch import Launch

# batch, tokens, channels, hidden, mode. A LayerNorm of very few channels now and then divides by next to
# nothing, which magnifies every rounding before it beyond what the tolerance allows for.
_SHAPES = (
    (2, 9, 26, 22, "channel"),
    (1, 5, 23, 37, "token"),
    (3, 1, 18, 27, "channel"),
    (2, 7, 39, 25, "token"),
    (0, 4, 4, 5, "channel"),
)


def _draw(device: torch.device, dtype: torch.dtype, generator: torch.Generator):
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype).to(device)


def _unit_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    draw = _draw(device, dtype, generator)
    samples = []
    for batch, tokens, channels, _, mode in _SHAPES:
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
        # Sums of sums: of the gate's product, of the LayerNorm, of the parameter gradients.
        samples.append(Sample(arguments, size * channels * max(batch * tokens, 1)))
    return samples


def _mlp_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    draw = _draw(device, dtype, generator)
    samples = []
    for batch, tokens, channels, hidden, mode in _SHAPES:
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
        # Sums of sums: fc1, gate and fc2, and of the parameter gradients.
        samples.append(Sample(arguments, channels * size * hidden * max(batch * tokens, 1)))
    return samples


def _gate_plan(dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch, on meta tensors; none where Triton is not installed."""
    if not backend.HAS_TRITON:
        return []
    from degmix_kernels.gating.plan_examples import gate_examples

    return gate_examples(dtype)


def _mlp_plan(dtype: torch.dtype) -> list[Launch]:
    """As ``_gate_plan``."""
    if not backend.HAS_TRITON:
        return []
    from degmix_kernels.gating.plan_examples import mlp_examples

    return mlp_examples(dtype)


OPS = (
    Op(
        name="spatial_gating_unit",
        function=spatial_gating_unit,
        reference=reference.spatial_gating_unit,
        module=SpatialGatingUnit,
        samples=_unit_samples,
        differentiable=("u", "v", "norm_weight", "norm_bias", "weight", "bias"),
        batched=("u", "v"),
        autocast=("u", "v", "weight", "bias"),
        kernels=_gate_plan,
    ),
    Op(
        name="gated_mlp",
        function=gated_mlp,
        reference=reference.gated_mlp,
        module=GatedMLP,
        samples=_mlp_samples,
        differentiable=(
            "x",
            "norm_weight",
            "norm_bias",
            "fc1_weight",
            "fc1_bias",
            "gate_norm_weight",
            "gate_norm_bias",
            "gate_weight",
            "gate_bias",
            "fc2_weight",
            "fc2_bias",
        ),
        batched=("x",),
        autocast=("x", "fc1_weight", "fc1_bias", "gate_weight", "gate_bias", "fc2_weight", "fc2_bias"),
        kernels=_mlp_plan,
    ),
)
