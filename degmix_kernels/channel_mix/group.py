"""Batch statistics over all processes of a group, as ``nn.SyncBatchNorm`` has them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


def combine(mean: Tensor, variance: Tensor, elements: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of elements over all processes, all fp32, from each one's own.

    A process may have no elements. Chan's formula, in fp64.
    """
    own = torch.cat([mean, variance, mean.new_full((1,), float(elements))])
    resolved = _resolve_process_group(group)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(resolved))]
    dist.all_gather(parts, own, group=resolved)
    every = torch.stack(parts).double()
    counts = every[:, -1:]
    means, variances = torch.where(counts > 0, every[:, :-1], 0).chunk(2, dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    variance = ((variances + (means - mean).square()) * counts).sum(0) / total
    return mean.float(), variance.float(), total.float()[None]


def mean_of(sums: list[Tensor], count: Tensor, group: str) -> list[Tensor]:
    """Sums over one process's elements, each a vector, as means over those of all processes."""
    total = torch.stack(sums)
    dist.all_reduce(total, group=_resolve_process_group(group))
    return list((total / count).unbind())
