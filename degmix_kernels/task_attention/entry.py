"""What the registry knows of attention over tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from degmix_kernels import backend
from degmix_kernels.contract import Sample
from degmix_kernels.contract_old import Cost, Op
from degmix_kernels.launch import Launch
from degmix_kernels.task_attention import reference
from degmix_kernels.task_attention.module import TaskAttention
from degmix_kernels.task_attention.op import task_attention

# batch, query tasks, key tasks, pixels, head dim, heads, whether heads share keys, whether there are values
_CALLS = (
    (2, 4, 4, 9, 5, 2, False, True),
    (1, 1, 8, 5, 7, 1, False, True),
    (3, 2, 1, 1, 2, 3, False, True),
    (0, 1, 3, 4, 2, 2, False, True),
    (1, 5, 5, 123, 1, 2, False, True),
    (2, 3, 4, 7, 16, 2, True, False),
    (1, 1, 3, 6, 40, 3, True, True),
    (2, 2, 2, 3, 8, 2, False, False),
)


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    samples = []
    for batch, queries, tasks, pixels, head_dim, heads, shared, values in _CALLS:
        channels = head_dim if shared else heads * head_dim
        arguments = {
            "query": draw(batch, queries, pixels, heads * head_dim),
            "key": draw(batch, tasks, pixels, channels),
            "value": draw(batch, tasks, pixels, channels) if values else None,
            "heads": heads,
        }
        samples.append(Sample(arguments, max(head_dim, tasks, queries * heads)))
    return samples


def _plan(dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch, on meta tensors; none where Triton is not installed."""
    if not backend.HAS_TRITON:
        return []
    from degmix_kernels.task_attention.plan import plan_examples

    return plan_examples(dtype)


def _products(arguments: Mapping[str, Any]) -> int:
    """2 · 2 · B · N · S · T · heads · D: scores of S queries and T keys, and their weighted sums."""
    return 4 * arguments["query"].numel() * arguments["key"].shape[1]


_COST = Cost(
    output=lambda arguments: tuple(arguments["query"].shape),
    products=_products,
    backward_products=2.5,
    backward_reads=("query", "key", "value"),
)


OPS = (
    Op(
        name="task_attention",
        function=task_attention,
        reference=reference.task_attention,
        module=TaskAttention,
        samples=_samples,
        differentiable=("query", "key", "value"),
        cost=_COST,
        batched=("query", "key", "value"),
        autocast=("query", "key", "value"),
        kernels=_plan,
    ),
)
