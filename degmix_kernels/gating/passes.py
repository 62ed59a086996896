"""The gate forward and backward: launches and matrix products in their order. Both ops are made of these."""

from __future__ import annotations

from typing import NamedTuple

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


def gate_forward(
    u: Tensor, v: Tensor, norm: Norm, weight: Tensor, bias: Tensor, mode: str, output: Tensor | None
) -> None:
    """``u ⊙ (weight · LayerNorm(v) + bias)``, into ``output``, or without one into u.

    Tensors are as ``as_rows`` makes them, parameters and ``output`` are contiguous.
    """
    if mode == "token":
        # Every block of tokens reads all of them: better normalised once.
        run(plan_mix_tokens(weight, normalised(v, norm, "identity"), bias, u, output), u.device)
    else:
        statistics = statistics_for(v, norm, v.shape[2])
        run(plan_linear(v, weight, bias, norm, statistics, multiplier=u, output=output), u.device)


class Wants(NamedTuple):
    """What somebody wants of the gate's backward pass beside the gradients of u and v.

    Attributes:
        norm: the gradients of the LayerNorm's parameters.
        weight: the gradient of the gate's weight.
        bias: the gradient of the gate's bias.
        gated: the gate's result.
        sums: the sums over all tokens of the gradients of u and v.
    """

    norm: bool
    weight: bool
    bias: bool
    gated: bool = False
    sums: bool = False


def gate_backward(
    grad: Tensor | None,
    u: Tensor,
    v: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor,
    mode: str,
    activation: str,
    wants: Wants,
    grad_u: Tensor | None,
    grad_v: Tensor | None,
) -> dict[str, Tensor | None]:
    """The way back through ``act(u) ⊙ (weight · LayerNorm(act(v)) + bias)``.

    Args:
        grad: of the result, contiguous; needed for any gradient.
        u: made by ``as_rows``.
        v: made by ``as_rows``.
        norm: of the forward pass; parameters are contiguous.
        weight: of the forward pass, contiguous.
        bias: of the forward pass, contiguous.
        mode: ``"channel"`` or ``"token"``.
        activation: of u and v.
        wants: what to compute.
        grad_u: filled with the gradient of u, if given; made by ``as_rows``.
        grad_v: filled with the gradient of v, if given; made by ``as_rows``.

    Returns:
        What is wanted, of norm_weight, norm_bias, weight, bias, gated, u_sum and v_sum; sums are fp32.
    """
    through_norm = grad_v is not None or wants.norm
    normed = normalised(v, norm, activation)
    grad_mixed = torch.empty_like(normed) if through_norm or wants.weight else None
    gated = torch.empty_like(normed) if wants.gated else None
    launch, bias_parts, u_parts = plan_gate_backward(
        normed, weight, bias, u, mode, activation, grad, gated, grad_mixed, grad_u, wants.bias,
        grad_u is not None and wants.sums,
    )  # fmt: skip
    run(launch, u.device)
    results = {"gated": gated}
    for name, parts in (("bias", bias_parts), ("u_sum", u_parts)):
        results[name] = None if parts is None else parts.sum(0)
    if wants.weight:
        results["weight"] = _weight_gradient(grad_mixed, normed, mode)
    if through_norm:
        # Nothing needs ``normed`` any more; its gradient takes its place.
        if mode == "token":
            elements = normed.shape[0]
            torch.bmm(weight.t().expand(elements, -1, -1), grad_mixed, out=normed)
        else:
            torch.mm(flat(grad_mixed), weight, out=flat(normed))
        launches, sums = plan_norm_backward(
            normed, v, norm, activation, None, grad_v, None, wants.norm or wants.sums
        )
        for launch in launches:
            run(launch, u.device)
        if wants.norm:
            results["norm_weight"], results["norm_bias"] = sums[0].sum(0), sums[1].sum(0)
        if wants.sums:
            results["v_sum"] = sums[2].sum(0)
    return results


def _weight_gradient(grad_mixed: Tensor, normed: Tensor, mode: str) -> Tensor:
    if mode == "channel":
        return flat(grad_mixed).t() @ flat(normed)
    launch, parts = plan_token_weight(grad_mixed, normed)
    run(launch, normed.device)
    return parts.sum(0)
