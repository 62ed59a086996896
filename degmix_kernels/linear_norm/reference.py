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

    blocks = len(weight) if weight.dim() == 3 else 1

    def rows(tensor: Tensor) -> Tensor:
        """(blocks, tokens of a block, channels)."""
        tensor = tensor.to(compute)
        tensor = tensor.permute(0, 2, 3, 1) if x.dim() == 4 else tensor
        return tensor.reshape(blocks, tensor.shape[:-1].numel() // blocks, tensor.shape[-1])

    def vectors(vector: Tensor) -> Tensor:
        return vector.to(compute).view(blocks, 1, -1)

    with autocast.disabled(x.device):
        z = rows(x) @ weight.to(compute).mT
        if bias is not None:
            z = z + vectors(bias)
        if addend is not None:
            z = z + rows(addend)
        output = functional.layer_norm(z, z.shape[2:], eps=eps) * vectors(norm_weight) + vectors(norm_bias)
        if residual is not None:
            output = output + rows(residual)
        output = output.to(x.dtype)
        if x.dim() == 4:
            return output.reshape(x.shape[0], *x.shape[2:], z.shape[2]).permute(0, 3, 1, 2)
        return output.reshape(*x.shape[:2], z.shape[2])
