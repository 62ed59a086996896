"""Attention over all tokens, with softmax and a gate or without softmax: the definition, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from degmix_kernels import autocast


def gated_attention(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Plain-PyTorch :func:`degmix_kernels.gated_attention`, with the same arguments (checked there)."""
    compute = torch.promote_types(query.dtype, torch.float32)
    with autocast.disabled(query.device):
        tokens = (query.to(compute), key.to(compute), value.to(compute))
        output = functional.scaled_dot_product_attention(*tokens)
        # PyTorch's CPU kernel takes a NaN score for a masked one and returns a number (2.11 and 2.15).
        undefined = query.isnan().any(-1, keepdim=True) | key.isnan().flatten(2).any(-1)[..., None, None]
        output = output + 0 / (~undefined).to(compute)  # 0 or NaN: PyTorch 2.8 saves no program with a NaN
        if gate is not None:
            output = output * gate.to(compute)
        if residual is not None:
            output = output + residual.to(compute)
        return output.to(query.dtype)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Plain-PyTorch :func:`degmix_kernels.linear_attention`, with the same arguments (checked there)."""
    compute = torch.promote_types(query.dtype, torch.float32)
    with autocast.disabled(query.device):
        context = key.to(compute).transpose(-2, -1) @ value.to(compute)  # (B, heads, D, D_value)
        return (query.to(compute) @ (context * scale)).to(query.dtype)
