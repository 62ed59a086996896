"""The gate forward and backward: launches and matrix products in their order. Both ops are made of these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from degmix_kernels.gating.backward_plan import plan_gate_backward, plan_norm_backward, plan_token_weight
from degmix_kernels.gating.plan import (
    plan_linear,
    plan_mix_tokens,
    plan_normalise,
    wants_statistics,
)
from degmix_kernels.launch import run

Norm = tuple[Tensor, Tensor, float]  # weight, bias, eps


def flat(tensor: Tensor) -> Tensor:
    """(B, N, C) → (B·N, C)."""
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], tensor.shape[2])


def sum_parts(parts: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Partial sums, along the first axis, to a gradient."""
    return None if parts is None else parts.sum(0).to(dtype)


def vector_gradient(total: Tensor, vector: Tensor) -> Tensor:
    """A sum as a gradient of its own memory: the results of a registered op share none."""
    return total.to(vector.dtype, copy=True)


def statistics_for(x: Tensor, norm: Norm, columns: int) -> Tensor | None:
    """Row statistics for ``plan_linear``, where it pays to compute them beforehand."""
    if not wants_statistics(x, columns):
        return None
    statistics = x.new_empty((2, x.shape[0] * x.shape[1]), dtype=torch.float32)
    run(plan_normalise(x, *norm, "identity", statistics, None), x.device)
    return statistics


def normalised(x: Tensor, norm: Norm, activation: str) -> Tensor:
    """``LayerNorm(act(x))``."""
    output = x.new_empty(x.shape)
    run(plan_normalise(x, *norm, activation, None, output), x.device)
    return output


def gate_forward(u: Tensor, v: Tensor, norm: Norm, weight: Tensor, bias: Tensor, mode: str) -> Tensor:
    """``u ⊙ (weight · LayerNorm(v) + bias)`` of tensors as ``as_rows`` makes them, parameters contiguous."""
    output = u.new_empty(u.shape)
    if mode == "token":
        # Every block of tokens reads all of them: better normalised once.
        run(plan_mix_tokens(weight, normalised(v, norm, "identity"), bias, u, output), u.device)
    else:
        statistics = statistics_for(v, norm, v.shape[2])
        run(plan_linear(v, weight, bias, norm, statistics, multiplier=u, output=output), u.device)
    return output


@dataclass(frozen=True)
class GateWants:
    """What of the gate's backward pass somebody wants.

    Attributes:
        u: the gradient of u.
        v: the gradient of v.
        norm: those of the LayerNorm's parameters.
        weight: that of the gate's weight.
        bias: that of its bias.
        gated: the gate's result.
        sums: the sums over all tokens of the gradients of u and v.
    """

    u: bool
    v: bool
    norm: bool
    weight: bool
    bias: bool
    gated: bool = False
    sums: bool = False

    @property
    def gradients(self) -> bool:
        """Whether any gradient is wanted."""
        return self.u or self.v or self.norm or self.weight or self.bias


@dataclass
class GateGradients:
    """Results of ``gate_backward``, each None where not wanted; sums are fp32."""

    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    gated: Tensor | None = None
    u_sum: Tensor | None = None
    v_sum: Tensor | None = None


def gate_backward(
    grad: Tensor | None,
    u: Tensor,
    v: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor,
    mode: str,
    activation: str,
    wants: GateWants,
    grad_u: Tensor | None,
    grad_v: Tensor | None,
) -> GateGradients:
    """The way back through ``act(u) ⊙ (weight · LayerNorm(act(v)) + bias)``.

    Args:
        grad: of the result, contiguous; not needed without ``wants.gradients``.
        u: made by ``as_rows``.
        v: likewise.
        norm: of the forward pass; parameters are contiguous.
        weight: likewise.
        bias: likewise.
        mode: ``"channel"`` or ``"token"``.
        activation: of u and v.
        wants: what to compute.
        grad_u: filled with the gradient of u, if that is wanted; made by ``as_rows``.
        grad_v: likewise.
    """
    results = GateGradients()
    through_norm = wants.v or wants.norm
    normed = normalised(v, norm, activation)
    grad_mixed = torch.empty_like(normed) if through_norm or wants.weight else None
    results.gated = torch.empty_like(normed) if wants.gated else None
    launch, bias_parts, u_parts = plan_gate_backward(
        normed, weight, bias, u, mode, activation, grad, results.gated, grad_mixed,
        grad_u if wants.u else None, wants.bias, wants.u and wants.sums,
    )  # fmt: skip
    run(launch, u.device)
    results.bias = sum_parts(bias_parts, bias.dtype)
    results.u_sum = None if u_parts is None else u_parts.sum(0)
    if wants.weight:
        results.weight = _weight_gradient(grad_mixed, normed, mode).to(weight.dtype)
    if through_norm:
        # Nothing needs ``normed`` any more; its gradient takes its place.
        if mode == "token":
            elements = normed.shape[0]
            torch.bmm(weight.t().expand(elements, -1, -1), grad_mixed, out=normed)
        else:
            torch.mm(flat(grad_mixed), weight, out=flat(normed))
        launches, parts = plan_norm_backward(
            normed, v, norm, activation, None, grad_v if wants.v else None, None, wants.norm or wants.sums
        )
        for launch in launches:
            run(launch, u.device)
        if parts is not None:
            sums = parts.sum(1)
            results.norm_weight = vector_gradient(sums[0], norm[0])
            results.norm_bias = vector_gradient(sums[1], norm[1])
            results.v_sum = sums[2]
    return results


def _weight_gradient(grad_mixed: Tensor, normed: Tensor, mode: str) -> Tensor:
    if mode == "channel":
        return flat(grad_mixed).t() @ flat(normed)
    launch, parts = plan_token_weight(grad_mixed, normed)
    run(launch, normed.device)
    return parts.sum(0)
