"""Attention over tasks at each pixel, the definition, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import autocast


def task_attention(
    query: Tensor, key: Tensor, value: Tensor | None = None, heads: int = 1, scale: float | None = None
) -> Tensor:
    """Plain-PyTorch :func:`degmix_kernels.task_attention`, with the same arguments (checked there)."""
    compute = torch.promote_types(query.dtype, torch.float32)
    head_dim = query.shape[3] // heads
    if scale is None:
        scale = head_dim**-0.5

    def split(tokens: Tensor) -> Tensor:  # (B, tasks, N, heads·D or D) → (B, N, heads or 1, tasks, D)
        return tokens.to(compute).unflatten(3, (-1, head_dim)).permute(0, 2, 3, 1, 4)

    with autocast.disabled(query.device):
        keys = split(key)
        values = keys if value is None else split(value)
        scores = split(query) @ keys.transpose(-2, -1) * scale  # (B, N, heads, S, T)
        attended = scores.softmax(-1) @ values  # (B, N, heads, S, D)
        return attended.permute(0, 3, 1, 2, 4).flatten(3).to(query.dtype)
