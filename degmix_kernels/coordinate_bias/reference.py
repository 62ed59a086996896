"""A bias by row or column, in plain PyTorch: differentiable, exact in fp64, the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import autocast


def coordinate_bias(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Plain-PyTorch :func:`degmix_kernels.coordinate_bias`, with the same arguments (checked there)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    height, width = x.shape[2:]
    with autocast.disabled(x.device):
        maps = [repeat_middle(rows.to(compute), 3, width), repeat_middle(columns.to(compute), 2, height)]
        return (x.to(compute) + torch.cat(maps, dim=1).flatten(0, 1)).to(x.dtype)


def repeat_middle(table: Tensor, dim: int, size: int) -> Tensor:
    """Repeat the second of three slices until there are ``size`` of them; fewer are all there."""
    if size <= 3:
        return table
    first, middle, last = table.split(1, dim)
    shape = list(table.shape)
    shape[dim] = size - 2
    return torch.cat([first, middle.expand(shape), last], dim)
