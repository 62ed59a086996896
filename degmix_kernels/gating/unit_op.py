"""The spatial gating unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from degmix_kernels import backend, checks, maps
from degmix_kernels.define import NotNegative, OwnDtype, define
from degmix_kernels.gating import reference

if backend.HAS_TRITON:
    from degmix_kernels.gating.passes import Wants, gate_backward, gate_forward
    from degmix_kernels.gating.plan import as_rows

MODES = ("channel", "token")
Mode = Annotated[str, checks.OneOf(MODES)]


class Call(NamedTuple):
    """Arguments of :func:`spatial_gating_unit`."""

    u: Tensor
    v: Tensor
    norm_weight: OwnDtype
    norm_bias: OwnDtype
    weight: Tensor
    bias: Tensor
    mode: Mode
    eps: NotNegative


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
    """Gate ``u`` by a mix of ``v``: ``u ⊙ (W · LayerNorm(v) + b)``.

    Under autocast ``u``, ``v``, ``weight`` and ``bias`` are cast to the autocast dtype, which the result has;
    the LayerNorm's parameters keep their dtype; doubles are left alone.

    Args:
        u: (B, N, C), floating point.
        v: (B, N, C).
        norm_weight: (C,), the LayerNorm's scale.
        norm_bias: (C,), its shift.
        weight: (C, C) in mode ``"channel"``, (N, N) in mode ``"token"``.
        bias: (C,) or (N,).
        mode: ``"channel"`` mixes the channels of each token (DeGMix), ``"token"`` the tokens of each channel
            (gMLP).
        eps: added to the LayerNorm's variance.

    Returns:
        (B, N, C), in the dtype of ``u``.

    Raises:
        TypeError: for a wrong type, dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Liu et al., arXiv 2105.08050, section 2.1 (tokens); DeGMix, arXiv 2308.05721 (channels).
    """
    call = op.checked(u, v, norm_weight, norm_bias, weight, bias, mode, eps)
    u = call.u
    checks.expect(u.dim() == 3, "u", "3 dimensions", u.shape)
    _, tokens, channels = u.shape
    checks.expect(channels > 0, "u", "at least one channel", u.shape)
    size = channels if call.mode == "channel" else tokens
    checks.expect_shape("v", call.v, u.shape)
    checks.expect_shape("norm_weight", call.norm_weight, (channels,))
    checks.expect_shape("norm_bias", call.norm_bias, (channels,))
    checks.expect_shape("weight", call.weight, (size, size))
    checks.expect_shape("bias", call.bias, (size,))
    if op.runs_triton(call):
        return op(call)
    return reference.spatial_gating_unit(*call)


def _outputs(call: Call) -> Tensor:
    return maps.empty_like(call.u)


def _rows(call: Call) -> Call:
    """The call as kernels read it: rows of u and v contiguous and equally far apart, all else contiguous."""
    return Call(as_rows(call.u), as_rows(call.v), *maps.contiguous(*call[2:6]), call.mode, call.eps)


def _forward(call: Call, output: Tensor) -> None:
    u, v, norm_weight, norm_bias, weight, bias, mode, eps = _rows(call)
    gate_forward(u, v, (norm_weight, norm_bias, eps), weight, bias, mode, output)


def _backward(
    call: Call, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Call
) -> dict[str, Tensor | None]:
    u, v, norm_weight, norm_bias, weight, bias, mode, eps = _rows(call)
    grad_u = torch.empty(u.shape, dtype=u.dtype, device=u.device) if wanted.u else None
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device) if wanted.v else None
    wants = Wants(wanted.norm_weight or wanted.norm_bias, wanted.weight, wanted.bias)
    norm, grad = (norm_weight, norm_bias, eps), grads[0].contiguous()
    found = gate_backward(grad, u, v, norm, weight, bias, mode, "identity", wants, grad_u, grad_v)
    return {"u": grad_u, "v": grad_v, **found}


def _products(call: Call) -> int:
    """Two per element and row of the weight: each element is one row times a token or a channel."""
    return 2 * call.v.numel() * call.weight.shape[0]


op = define("spatial_gating_unit", Call, _outputs, _forward, _backward, _products)
