"""Channel-aware mixing, the definition, in plain PyTorch: differentiable, exact in fp64, the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from degmix_kernels import autocast
from degmix_kernels.activation import activate


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
        output = batch_norm(mixed, *statistics, norm_weight, norm_bias, training, momentum, eps)
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


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch normalisation over all axes but the second, right for any layout of the incoming gradient.

    The batch's own statistics are used in training, and where no running ones are given; running statistics
    are updated in place, in training. Statistics and arithmetic are in fp32 (fp64 for doubles), so is the
    result.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # PyTorch keeps the statistics of half-precision modules in half; the sums must not be.
    statistics = [None if s is None else s.to(x.dtype) for s in (running_mean, running_var)]
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    use_batch = training or running_mean is None
    # On a CPU, a contiguous 4-D map of batch 1 gets a wrong gradient (PyTorch 2.11, 2.15) if the one that
    # arrives has channels_last strides but for the batch's, which means nothing at size 1. With its pixels on
    # one axis a map has no channels_last to be mistaken about.
    flat = x.flatten(2) if x.dim() == 4 and x.is_contiguous() else x
    output = functional.batch_norm(flat, *statistics, weight, bias, use_batch, momentum, eps).view_as(x)
    if training:
        for kept, updated in zip((running_mean, running_var), statistics, strict=True):
            if kept is not None and kept is not updated:
                kept.copy_(updated)
    return output
