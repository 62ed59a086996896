"""Calls of attention over tasks: what the contract tests run, what the compile check compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from degmix_kernels.contract import Op, Sample, Shape
from degmix_kernels.task_attention import reference
from degmix_kernels.task_attention.module import TaskAttention
from degmix_kernels.task_attention.op import op, task_attention

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


def _shapes(dtype: torch.dtype) -> Iterator[Shape]:
    """DeGMix on NYUD-v2, the most tasks, odd, small and large heads, more than 2³¹ elements."""
    nyud = 107 * 140
    # batch, query tasks, tasks, pixels, heads, head dim, shared keys, values
    calls = [
        (8, 4, 4, nyud, 2, 128, False, True),
        (8, 4, 4, nyud, 2, 256, True, False),
        (8, 8, 8, nyud, 1, 256, False, True),
        (2, 2, 8, 900, 1, 16, False, True),
    ]
    if dtype == torch.bfloat16:
        calls += [
            (8, 1, 4, nyud, 2, 256, True, False),
            (8, 5, 5, nyud, 2, 128, False, True),
            (2, 2, 8, 900, 1, 1023, False, True),
            (2, 3, 3, 99, 2, 37, False, True),
            (2, 3, 2, 99, 2, 40, False, True),
            (8, 4, 4, 1024 * 2048, 2, 128, False, True),
        ]
    if dtype == torch.float16:  # the code of bf16 but for conversions
        calls = calls[:2]
    for batch, query_tasks, tasks, pixels, heads, head_dim, shared, values in calls:
        query = torch.empty((batch, query_tasks, pixels, heads * head_dim), dtype=dtype)
        key = torch.empty((batch, tasks, pixels, head_dim if shared else heads * head_dim), dtype=dtype)
        value = torch.empty_like(key) if values else None
        yield Shape({"query": query, "key": key, "value": value, "heads": heads})


OPS = (
    Op(
        op=op,
        function=task_attention,
        reference=reference.task_attention,
        module=TaskAttention,
        samples=_samples,
        shapes=_shapes,
        batched=("query", "key", "value"),
        backward_reads=("query", "key", "value"),
    ),
)
