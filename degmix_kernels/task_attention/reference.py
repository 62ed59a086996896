"""Attention over tasks at each pixel, the definition, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import autocast


def task_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Plain-PyTorch :func:`degmix_kernels.task_attention`, with the same arguments (checked there)."""
    compute = torch.promote_types(query.dtype, torch.float32)

    def split(tokens: Tensor) -> Tensor:  # (B, tasks, N, C) → (B, N, heads, tasks, head_dim)
        return tokens.to(compute).unflatten(3, (heads, -1)).permute(0, 2, 3, 1, 4)

    with autocast.disabled(query.device):
        head_dim = query.shape[3] // heads
        scores = split(query) @ split(key).transpose(-2, -1) * head_dim**-0.5  # (B, N, heads, S, T)
        attended = scores.softmax(-1) @ split(value)  # (B, N, heads, S, head_dim)
        return attended.permute(0, 3, 1, 2, 4).flatten(3).to(query.dtype)
