"""What the registry knows of gating."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from degmix_kernels import backend
from degmix_kernels.contract import Sample
from degmix_kernels.contract_old import Cost, Op
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
        # In succession: of the LayerNorm, of the gate's product, over tokens of the parameters' gradients.
        samples.append(Sample(arguments, channels + size + batch * tokens))
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
        # In succession: of a LayerNorm and fc1, of another and the gate, of fc2; over tokens of gradients.
        samples.append(Sample(arguments, 2 * channels + size + 2 * hidden + batch * tokens))
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


def _gate_products(arguments: Mapping[str, Any], tokens: int, channels: int) -> int:
    """2 · tokens · channels · size of W: each element is one row of W times a token or a channel."""
    weight = "weight" if "weight" in arguments else "gate_weight"
    return 2 * tokens * channels * arguments[weight].shape[0]


def _unit_products(arguments: Mapping[str, Any]) -> int:
    channels = arguments["v"].shape[2]
    return _gate_products(arguments, arguments["v"].numel() // channels, channels)


def _mlp_products(arguments: Mapping[str, Any]) -> int:
    """The gate's; fc1, 2 · tokens · C · 2 hidden, and fc2, 2 · tokens · hidden · C."""
    channels, hidden = arguments["fc2_weight"].shape
    tokens = arguments["x"].numel() // channels
    return _gate_products(arguments, tokens, hidden) + 6 * tokens * channels * hidden


_UNIT_COST = Cost(
    output=lambda arguments: tuple(arguments["u"].shape),
    products=_unit_products,
    backward_products=2,
    backward_reads=("u", "v", "norm_weight", "norm_bias", "weight", "bias"),
)
_MLP_COST = Cost(
    output=lambda arguments: tuple(arguments["x"].shape),
    products=_mlp_products,
    backward_products=2,
    backward_reads=(
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
    ),
)


OPS = (
    Op(
        name="spatial_gating_unit",
        function=spatial_gating_unit,
        reference=reference.spatial_gating_unit,
        module=SpatialGatingUnit,
        samples=_unit_samples,
        differentiable=("u", "v", "norm_weight", "norm_bias", "weight", "bias"),
        cost=_UNIT_COST,
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
        cost=_MLP_COST,
        batched=("x",),
        autocast=("x", "fc1_weight", "fc1_bias", "gate_weight", "gate_bias", "fc2_weight", "fc2_bias"),
        kernels=_mlp_plan,
    ),
)
