"""What the registry knows of attention over all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from degmix_kernels import backend
from degmix_kernels.attention import reference
from degmix_kernels.attention.module import GatedAttention, LinearAttention
from degmix_kernels.attention.op import gated_attention, linear_attention
from degmix_kernels.contract import Sample
from degmix_kernels.contract_old import Cost, Op
from degmix_kernels.launch import Launch

# batch, heads, queries, keys, head_dim, gate, residual
_SHAPES = (
    (2, 2, 9, 7, 5, True, True),
    (1, 1, 1, 17, 3, False, True),
    (3, 2, 5, 1, 1, True, False),
    (0, 2, 4, 4, 4, True, True),
    (1, 3, 33, 33, 8, False, False),
)


def _tensors(shape: tuple, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict:
    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    batch, heads, queries, keys, head_dim, gate, residual = shape
    return {
        "query": draw(batch, heads, queries, head_dim),
        "key": draw(batch, heads, keys, head_dim),
        "value": draw(batch, heads, keys, head_dim),
        "gate": draw(batch, heads, queries, head_dim) if gate else None,
        "residual": draw(batch, heads, queries, head_dim) if residual else None,
    }


def _terms_of_one_key(arguments: Mapping[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """A score's gradient is grad · value minus its mean over the keys. With one key, the two are the same."""
    query, key, value, gate = (arguments[name].double() for name in ("query", "key", "value", "gate"))
    grad_scores = (grad.double() * gate * value).sum(-1, keepdim=True) * query.shape[3] ** -0.5
    return {"query": grad_scores * key, "key": grad_scores * query}


def _gated_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for shape in _SHAPES:
        terms = _terms_of_one_key if shape[3] == 1 else None
        arguments = _tensors(shape, device, dtype, generator)
        samples.append(Sample(arguments, max(shape[2], shape[3], shape[4]), terms=terms))
    return samples


def _linear_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for shape in _SHAPES:
        tensors = _tensors((*shape[:5], False, False), device, dtype, generator)
        arguments = {name: tensors[name] for name in ("query", "key", "value")} | {"scale": shape[4] ** -0.5}
        samples.append(Sample(arguments, max(shape[2], shape[3], shape[4])))
    return samples


def _gated_plan(dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch, on meta tensors; none where Triton is not installed."""
    if not backend.HAS_TRITON:
        return []
    from degmix_kernels.attention.plan import plan_examples

    return plan_examples(dtype)


def _linear_plan(dtype: torch.dtype) -> list[Launch]:
    """Likewise, without softmax."""
    if not backend.HAS_TRITON:
        return []
    from degmix_kernels.attention.linear_plan import plan_examples

    return plan_examples(dtype)


def _gated_products(arguments: Mapping[str, Any]) -> int:
    """2 · 2 · B · heads · N · M · D: Q Kᵀ, and its softmax times V."""
    return 4 * arguments["query"].numel() * arguments["key"].shape[2]


def _linear_products(arguments: Mapping[str, Any]) -> int:
    """2 · B · heads · (M + N) · D · D: Kᵀ V, and Q times it."""
    query, key = arguments["query"], arguments["key"]
    return 2 * (query.numel() + key.numel()) * query.shape[3]


_GATED_COST = Cost(
    output=lambda arguments: tuple(arguments["query"].shape),
    products=_gated_products,
    backward_products=2.5,
    backward_reads=("query", "key", "value", "gate"),
    passed_on=("residual",),
)
_LINEAR_COST = Cost(
    output=lambda arguments: tuple(arguments["query"].shape),
    products=_linear_products,
    backward_products=2,  # Kᵀ V is small enough to be kept
    backward_reads=("query", "key", "value"),
)


OPS = (
    Op(
        name="gated_attention",
        function=gated_attention,
        reference=reference.gated_attention,
        module=GatedAttention,
        samples=_gated_samples,
        differentiable=("query", "key", "value", "gate", "residual"),
        cost=_GATED_COST,
        batched=("query", "key", "value", "gate", "residual"),
        autocast=("query", "key", "value", "gate", "residual"),
        kernels=_gated_plan,
    ),
    Op(
        name="linear_attention",
        function=linear_attention,
        reference=reference.linear_attention,
        module=LinearAttention,
        samples=_linear_samples,
        differentiable=("query", "key", "value"),
        cost=_LINEAR_COST,
        batched=("query", "key", "value"),
        autocast=("query", "key", "value"),
        kernels=_linear_plan,
    ),
)
