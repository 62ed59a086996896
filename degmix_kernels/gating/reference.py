"""The spatial gating unit and the gated MLP around it, the definition, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from degmix_kernels import autocast


def spatial_gating_unit(
    u: Tensor,
    v: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    mode: str = "channel",
    eps: float = 1e-5,
) -> Tensor:
    """Plain-PyTorch :func:`degmix_kernels.spatial_gating_unit`, with the same arguments (checked there)."""
    with autocast.disabled(u.device):
        operands = _upcast(u.dtype, u, v, norm_weight, norm_bias, weight, bias)
        return _gate(*operands, mode, eps).to(u.dtype)


def gated_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    gate_norm_weight: Tensor,
    gate_norm_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    mode: str = "channel",
    eps: float = 1e-5,
    recompute: bool = False,
) -> Tensor:
    """Plain-PyTorch :func:`degmix_kernels.gated_mlp`, with the same arguments (checked there)."""
    with autocast.disabled(x.device):
        tokens, norm_weight, norm_bias = _upcast(x.dtype, x, norm_weight, norm_bias)
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = _upcast(
            x.dtype, fc1_weight, fc1_bias, fc2_weight, fc2_bias
        )
        gate = _upcast(x.dtype, gate_norm_weight, gate_norm_bias, gate_weight, gate_bias)
        normed = functional.layer_norm(tokens, norm_weight.shape, norm_weight, norm_bias, eps)
        u, v = functional.gelu(functional.linear(normed, fc1_weight, fc1_bias)).chunk(2, dim=-1)
        return (tokens + functional.linear(_gate(u, v, *gate, mode, eps), fc2_weight, fc2_bias)).to(x.dtype)


def _gate(
    u: Tensor,
    v: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    mode: str,
    eps: float,
) -> Tensor:
    normed = functional.layer_norm(v, norm_weight.shape, norm_weight, norm_bias, eps)
    if mode == "channel":  # W mixes the channels of one token
        return u * functional.linear(normed, weight, bias)
    return u * (weight @ normed + bias[:, None])  # W mixes the tokens of one channel


def _upcast(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The tensors in fp32, or in fp64 where tokens of this dtype are doubles."""
    compute = torch.promote_types(dtype, torch.float32)
    return [tensor.to(compute) for tensor in tensors]
