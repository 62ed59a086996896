"""Channel-aware mixing, the definition, in plain PyTorch: differentiable, exact in fp64, the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional

from degmix_kernels import autocast
from degmix_kernels.activation import activate
from degmix_kernels.batch_norm.reference import batch_norm, gather_and_normalize
from degmix_kernels.batch_norm.running import update_running


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
    process_group: ProcessGroup | None = None,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Plain-PyTorch :func:`degmix_kernels.channel_mix`, with the same arguments (checked there)."""
    with autocast.disabled(x.device):
        mixed = mix_and_activate(x, weight, bias, activation)
        running = (running_mean, running_var)
        if process_group is not None and (training or running_mean is None):
            mean, variance, count = gather_from(mixed, process_group)
            if training and running_mean is not None:
                update_running(*running, mean.detach(), variance.detach(), count, momentum)
            output = batch_norm(mixed, mean, variance, norm_weight, norm_bias, None, eps)
        elif statistics:
            output, mean, variance = normalize(mixed, norm_weight, norm_bias, eps)
        else:
            output = gather_and_normalize(mixed, *running, norm_weight, norm_bias, training, momentum, eps)
        if residual is not None:
            output = output + residual.to(output.dtype)
    output = output.to(x.dtype)
    return (output, mean.detach(), variance.detach()) if statistics else output


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` normalised by its own statistics, and these: zeros where ``x`` has no elements."""
    output = gather_and_normalize(x, None, None, weight, bias, True, 0.0, eps)
    if x.numel() == 0:
        return output, *x.new_zeros(2, x.shape[1]).unbind()
    axes = [axis for axis in range(x.dim()) if axis != 1]
    variance, mean = torch.var_mean(x.detach(), axes, correction=0)
    return output, mean, variance


def mix_and_activate(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(W x + b)`` at every pixel or token, in fp32 (fp64 for doubles)."""
    if x.dim() == 2:
        return mix_and_activate(x[:, :, None, None], weight, bias, activation)[..., 0, 0]
    if x.shape[2] * x.shape[3] == 0:  # PyTorch's convolution takes no images, but not images without pixels
        pixels = x.movedim(1, 3)
        mixed = mix_and_activate(pixels.flatten(0, 2), weight, bias, activation)
        return mixed.view(*pixels.shape[:3], mixed.shape[1]).movedim(3, 1)
    compute = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(compute), weight.to(compute)
    bias = None if bias is None else bias.to(compute)
    groups = x.shape[1] // weight.shape[1]
    weight = weight.flatten(1)[:, :, None, None]
    return activate(functional.conv2d(x, weight, bias, groups=groups), activation)


def gather_from(x: Tensor, process_group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of elements per channel over all processes, differentiable."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    count = all_reduce(x.new_full((1,), x.numel() // x.shape[1]), group=process_group)
    mean = all_reduce(x.sum(axes), group=process_group) / count
    deviation = x - mean.view(-1, *[1] * (x.dim() - 2))
    return mean, all_reduce(deviation.square().sum(axes), group=process_group) / count, count
