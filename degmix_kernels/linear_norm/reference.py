"""Linear and LayerNorm, the definition, in plain PyTorch: differentiable, exact in fp64, the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from degmix_kernels import autocast


def linear_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Plain-PyTorch :func:`degmix_kernels.linear_norm`, with the same arguments (checked there)."""
    compute = torch.promote_types(x.dtype, torch.float32)

    def channels_last(tensor: Tensor) -> Tensor:
        tensor = tensor.to(compute)
        return tensor.permute(0, 2, 3, 1) if x.dim() == 4 else tensor

    with autocast.disabled(x.device):
        z = functional.linear(
            channels_last(x), weight.to(compute), None if bias is None else bias.to(compute)
        )
        if addend is not None:
            z = z + channels_last(addend)
        output = functional.layer_norm(
            z, norm_weight.shape, norm_weight.to(compute), norm_bias.to(compute), eps
        )
        if residual is not None:
            output = output + channels_last(residual)
        output = output.permute(0, 3, 1, 2) if x.dim() == 4 else output
        return output.to(x.dtype)
