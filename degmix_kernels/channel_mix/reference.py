"""Channel-aware mixing, the definition, in plain PyTorch: differentiable, exact in fp64, the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from degmix_kernels import autocast
from degmix_kernels.activation import activate
from degmix_kernels.batch_norm.reference import gather_and_normalize


def channel_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    """Plain-PyTorch :func:`degmix_kernels.channel_mix`, with the same arguments (checked there)."""
    with autocast.disabled(x.device):
        mixed = mix_and_activate(x, weight, bias, activation)
        statistics = (running_mean, running_var)
        output = gather_and_normalize(mixed, *statistics, norm_weight, norm_bias, training, momentum, eps)
        if residual is not None:
            output = output + residual.to(output.dtype)
    return output.to(x.dtype)


def mix_and_activate(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(W x + b)`` at every pixel or token, in fp32 (fp64 for doubles)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(compute), weight.to(compute)
    bias = None if bias is None else bias.to(compute)
    if x.dim() == 2:
        return activate(functional.linear(x, weight.flatten(1), bias), activation)
    return activate(functional.conv2d(x, weight.flatten(1)[:, :, None, None], bias), activation)
