"""Batch normalisation in plain PyTorch: differentiable, exact in fp64, the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import autocast


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Plain-PyTorch :func:`degmix_kernels.batch_norm`, with the same arguments (checked there)."""
    compute = torch.promote_types(x.dtype, torch.float32)

    def per_channel(vector: Tensor) -> Tensor:
        return vector.to(compute).view(-1, *[1] * (x.dim() - 2))

    with autocast.disabled(x.device):
        scale = (variance.to(compute) + eps).rsqrt()
        if weight is not None:
            scale = scale * weight.to(compute)
        # Subtracted before anything is scaled: of a large mean only the difference is rounded.
        output = (x.to(compute) - per_channel(mean)) * per_channel(scale)
        if bias is not None:
            output = output + per_channel(bias)
        if residual is not None:
            output = output + residual.to(compute)
        return output.to(x.dtype)


def gather_and_normalize(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """``torch.nn.functional.batch_norm``, right for any layout of the incoming gradient.

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
    # Not functional.batch_norm, which refuses an eps of 0 in training.
    cudnn = torch.backends.cudnn.enabled
    output = torch.batch_norm(flat, weight, bias, *statistics, use_batch, momentum, eps, cudnn).view_as(x)
    if training:
        for kept, updated in zip((running_mean, running_var), statistics, strict=True):
            if kept is not None and kept is not updated:
                kept.copy_(updated)
    return output
