"""The spatial gating unit and the gated MLP, the public functions: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from degmix_kernels import autocast, backend, checks
from degmix_kernels.gating import reference

if backend.HAS_TRITON:
    from degmix_kernels.gating.autograd import gate_op, mlp_op

MODES = ("channel", "token")


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
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Liu et al., arXiv 2105.08050, section 2.1 (tokens); DeGMix, arXiv 2308.05721 (channels).
    """
    checks.expect_tensor("u", u, dims=3)
    checks.expect_tensor("v", v, dims=3)
    u, v, weight, bias = autocast.cast_inputs(u.device, u, v, weight, bias)
    checks.expect_like("v", v, "u", u)
    checks.expect_shape("v", v, tuple(u.shape))
    _check_norm({"norm_weight": norm_weight, "norm_bias": norm_bias}, u, u.shape[2])
    _check_gate({"weight": weight, "bias": bias}, u, u.shape[2], mode)
    if backend.runs_triton("spatial_gating_unit", u.device, u.dtype):
        return gate_op(u, v, norm_weight, norm_bias, weight, bias, mode, eps)
    return reference.spatial_gating_unit(u, v, norm_weight, norm_bias, weight, bias, mode, eps)


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
    """A gated MLP with its residual: ``x + fc2(SGU(split(GELU(fc1(LayerNorm(x))))))``.

    GELU is exact.

    Under autocast ``x`` and the weights and biases of fc1, fc2 and the gate are cast to the autocast dtype,
    which the result has; the LayerNorms' parameters keep their dtype; doubles are left alone.

    Args:
        x: (B, N, C), floating point.
        norm_weight: (C,), scale of the first LayerNorm.
        norm_bias: (C,), its shift.
        fc1_weight: (2·hidden, C).
        fc1_bias: (2·hidden,).
        gate_norm_weight: (hidden,), scale of the gate's LayerNorm.
        gate_norm_bias: (hidden,), its shift.
        gate_weight: (hidden, hidden) in mode ``"channel"``, (N, N) in mode ``"token"``.
        gate_bias: (hidden,) or (N,).
        fc2_weight: (C, hidden).
        fc2_bias: (C,).
        mode: as in :func:`spatial_gating_unit`.
        eps: added to both LayerNorms' variances.
        recompute: keep nothing but the arguments for the backward pass, not the (B, N, 2·hidden) tensor
            before the GELU, which the backward pass then computes again.

    Returns:
        (B, N, C), in the dtype of ``x``.

    Raises:
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Liu et al., arXiv 2105.08050, section 2 (tokens); DeGMix, arXiv 2308.05721, gating (channels).
    """
    checks.expect_tensor("x", x, dims=3)
    cast = autocast.cast_inputs(
        x.device, x, fc1_weight, fc1_bias, gate_weight, gate_bias, fc2_weight, fc2_bias
    )
    x, fc1_weight, fc1_bias, gate_weight, gate_bias, fc2_weight, fc2_bias = cast
    checks.expect_tensor("fc1_weight", fc1_weight, dims=2)
    channels = x.shape[2]
    hidden = fc1_weight.shape[0] // 2
    checks.expect(
        hidden > 0 and fc1_weight.shape[0] % 2 == 0,
        "fc1_weight",
        "2·hidden rows",
        f"shape {tuple(fc1_weight.shape)}",
    )
    expected = {
        "fc1_weight": (fc1_weight, (2 * hidden, channels)),
        "fc1_bias": (fc1_bias, (2 * hidden,)),
        "fc2_weight": (fc2_weight, (channels, hidden)),
        "fc2_bias": (fc2_bias, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        checks.expect_tensor(name, tensor)
        checks.expect_like(name, tensor, "x", x)
        checks.expect_shape(name, tensor, shape)
    _check_norm({"norm_weight": norm_weight, "norm_bias": norm_bias}, x, channels)
    gate_norm = {"gate_norm_weight": gate_norm_weight, "gate_norm_bias": gate_norm_bias}
    _check_norm(gate_norm, x, hidden)
    _check_gate({"gate_weight": gate_weight, "gate_bias": gate_bias}, x, hidden, mode)
    tensors = (
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, gate_norm_weight, gate_norm_bias, gate_weight,
        gate_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    if backend.runs_triton("gated_mlp", x.device, x.dtype):
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors) and not recompute
        return mlp_op(*tensors, mode, eps, keep)[0]
    if recompute and torch.is_grad_enabled():
        return checkpoint(reference.gated_mlp, *tensors, mode, eps, use_reentrant=False)
    return reference.gated_mlp(*tensors, mode, eps)


def _check_norm(parameters: dict[str, Tensor], tokens: Tensor, channels: int) -> None:
    """LayerNorm parameters, by name: of any floating dtype, on the device of the tokens."""
    checks.expect(channels > 0, "channels", "at least 1", channels)
    for name, tensor in parameters.items():
        checks.expect_tensor(name, tensor)
        checks.expect_shape(name, tensor, (channels,))
        if tensor.device != tokens.device:
            raise TypeError(f"{name}: expected device {tokens.device} as the input, got {tensor.device}")


def _check_gate(parameters: dict[str, Tensor], tokens: Tensor, channels: int, mode: str) -> None:
    """Weight and bias of the gate, by name: as large as the axis they mix, like the tokens."""
    checks.expect_choice("mode", mode, MODES)
    size = channels if mode == "channel" else tokens.shape[1]
    for (name, tensor), shape in zip(parameters.items(), ((size, size), (size,)), strict=True):
        checks.expect_tensor(name, tensor)
        checks.expect_like(name, tensor, "the input", tokens)
        checks.expect_shape(name, tensor, shape)
