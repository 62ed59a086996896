"""What the registry knows of attention over tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels.contract import Op, Sample
from degmix_kernels.task_attention import reference
from degmix_kernels.task_attention.module import TaskAttention
from degmix_kernels.task_attention.op import task_attention

# batch, query tasks, key tasks, pixels, channels, heads
_SHAPES = (
    (2, 4, 4, 9, 10, 2),
    (1, 1, 8, 5, 7, 1),
    (3, 2, 1, 1, 6, 3),
    (0, 1, 3, 4, 4, 2),
    (1, 5, 5, 123, 2, 2),
)


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    return [
        Sample(
            {
                "query": draw(batch, queries, pixels, channels),
                "key": draw(batch, tasks, pixels, channels),
                "value": draw(batch, tasks, pixels, channels),
                "heads": heads,
            },
            max(channels // heads, tasks, queries),
        )
        for batch, queries, tasks, pixels, channels, heads in _SHAPES
    ]


OPS = (
    Op(
        name="task_attention",
        function=task_attention,
        reference=reference.task_attention,
        module=TaskAttention,
        samples=_samples,
        differentiable=("query", "key", "value"),
        batched=("query", "key", "value"),
        autocast=("query", "key", "value"),
    ),
)
