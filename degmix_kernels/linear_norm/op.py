"""Linear and LayerNorm in one pass, the public function: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import autocast, backend, checks, maps
from degmix_kernels.linear_norm import reference

if backend.HAS_TRITON:
    from degmix_kernels.linear_norm.autograd import norm_op

# A row is normalised where it is computed, so one program computes all of it, in registers.
MAX_CHANNELS = 512


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
    """A Linear, normalised over its channels: ``LayerNorm(W x + b + addend) + residual``.

    Tokens may belong to G blocks, such as tasks, each with parameters of its own.

    The Triton kernels take up to 512 out channels; more run the reference.

    Under autocast ``x``, ``weight``, ``bias``, ``addend`` and ``residual`` are cast to the autocast dtype and
    the result has it; the LayerNorm's parameters keep their dtype; doubles are left alone.

    Args:
        x: (B, N, C) tokens, or a map (B, C, H, W), channels_last in, channels_last out; floating point.
        weight: (Cout, C); or, for tokens, (G, Cout, C): the first B/G sequences are multiplied with the first
            matrix, the next with the second, and so on. G divides B.
        bias: (Cout,), or (G, Cout) with G weights, as all vectors.
        norm_weight: (Cout,), the LayerNorm's scale.
        norm_bias: (Cout,), its shift.
        addend: shaped as the result, added before the normalisation.
        residual: shaped as the result, added after it.
        eps: added to the variance.

    Returns:
        (B, N, Cout) or (B, Cout, H, W), in the dtype of ``x``.

    Raises:
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Ba et al., arXiv 1607.06450, equations 3 and 4, behind a linear layer; DeGMix, arXiv 2308.05721,
    ends its attention blocks so.
    """
    checks.expect_tensor("x", x)
    checks.expect(x.dim() in (3, 4), "x", "3 or 4 dimensions", f"shape {tuple(x.shape)}")
    checks.expect_tensor("weight", weight)
    checks.expect(weight.dim() in (2, 3), "weight", "2 or 3 dimensions", weight.shape)
    blocks = tuple(weight.shape[:-2])
    checks.expect(not blocks or x.dim() == 3, "weight", "2 dimensions for a map", weight.shape)
    x, weight, bias, addend, residual = autocast.cast_inputs(x.device, x, weight, bias, addend, residual)
    axis = 1 if x.dim() == 4 else 2
    out_channels = weight.shape[-2]
    checks.expect_like("weight", weight, "x", x)
    checks.expect(min(weight.shape) > 0, "weight", "no empty dimension", tuple(weight.shape))
    checks.expect_shape("weight", weight, (*blocks, out_channels, x.shape[axis]))
    divides = not blocks or x.shape[0] % blocks[0] == 0
    checks.expect(divides, "weight", "a first dimension that divides the batch of x", weight.shape)
    if x.dim() == 4:
        shape = (x.shape[0], out_channels, *x.shape[2:])
    else:
        shape = (*x.shape[:2], out_channels)
    for name, tensor, expected in (
        ("bias", bias, (*blocks, out_channels)),
        ("addend", addend, shape),
        ("residual", residual, shape),
    ):
        if tensor is not None:
            checks.expect_tensor(name, tensor)
            checks.expect_like(name, tensor, "x", x)
            checks.expect_shape(name, tensor, expected)
    for name, tensor in {"norm_weight": norm_weight, "norm_bias": norm_bias}.items():
        checks.expect_tensor(name, tensor)
        checks.expect_device(name, tensor, "x", x)
        checks.expect_shape(name, tensor, (*blocks, out_channels))
    missing = f"more than {MAX_CHANNELS} out channels" if out_channels > MAX_CHANNELS else ""
    if backend.runs_triton("linear_norm", x.device, x.dtype, missing):
        leaves = (t for t in (x, weight, bias, norm_weight, norm_bias, addend) if t is not None)
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves)
        return norm_op(x, weight, bias, norm_weight, norm_bias, addend, residual, eps, keep)[0]
    output = reference.linear_norm(x, weight, bias, norm_weight, norm_bias, addend, residual, eps)
    if x.dim() == 4:
        last = maps.is_channels_last(x)
        return output.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return output
