"""The registered ops behind ``spatial_gating_unit`` and ``gated_mlp``: allocation, launches, products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from degmix_kernels.gating.backward_plan import plan_norm_backward
from degmix_kernels.gating.passes import (
    GateWants,
    flat,
    gate_backward,
    gate_forward,
    normalised,
    statistics_for,
    vector_gradient,
)
from degmix_kernels.gating.plan import as_rows, plan_linear
from degmix_kernels.launch import run
from degmix_kernels.registered import RegisteredOp


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _empty_gradients(tensors: tuple[Tensor, ...], wanted: list[bool]) -> list[Tensor]:
    """One gradient per tensor, contiguous, empty where it is not wanted."""
    return [
        tensor.new_empty(tensor.shape if want else (0,)) for tensor, want in zip(tensors, wanted, strict=True)
    ]


def _chosen(gradients: list[Tensor | None], tensors: tuple[Tensor, ...], wanted: list[bool]) -> list[Tensor]:
    """What a backward op returns: gradients that are wanted, an empty tensor for every other."""
    return [
        gradient if want else tensor.new_empty(0)
        for gradient, tensor, want in zip(gradients, tensors, wanted, strict=True)
    ]


def _sorted(gradients: list[Tensor], wanted: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


# --- spatial_gating_unit -----------------------------------------------------------------------------------


def _forward(
    u: Tensor,
    v: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    mode: str,
    eps: float,
) -> Tensor:
    norm_weight, norm_bias, weight, bias = _contiguous(norm_weight, norm_bias, weight, bias)
    return gate_forward(as_rows(u), as_rows(v), (norm_weight, norm_bias, eps), weight, bias, mode)


def _fake_forward(
    u: Tensor,
    v: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    mode: str,
    eps: float,
) -> Tensor:
    return u.new_empty(u.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.mode, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    mode: str,
    eps: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of the six tensors, an empty tensor for each that is not wanted."""
    tensors = (u, v, norm_weight, norm_bias, weight, bias)
    results = _empty_gradients(tensors, wanted)
    if not any(wanted):
        return results
    u, v = as_rows(u), as_rows(v)
    grad, norm_weight, norm_bias, weight, bias = _contiguous(grad, norm_weight, norm_bias, weight, bias)
    wants = GateWants(wanted[0], wanted[1], wanted[2] or wanted[3], wanted[4], wanted[5])
    found = gate_backward(
        grad, u, v, (norm_weight, norm_bias, eps), weight, bias, mode, "identity", wants, *results[:2]
    )
    vectors = [found.norm_weight, found.norm_bias, found.weight, found.bias]
    return _chosen([*results[:2], *vectors], tensors, wanted)


def _fake_backward(
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    mode: str,
    eps: float,
    wanted: list[bool],
) -> list[Tensor]:
    return _empty_gradients((u, v, norm_weight, norm_bias, weight, bias), wanted)


def _differentiate(ctx: Any, backward: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:6])
    gradients = backward(grad, *ctx.saved_tensors, ctx.mode, ctx.eps, wanted)
    return *_sorted(gradients, wanted), None, None


# gate_op(u, v, norm_weight, norm_bias, weight, bias, mode, eps)
gate_op = RegisteredOp(
    "degmix::spatial_gating_unit",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    _fake_backward,
    _differentiate,
)


# --- gated_mlp ---------------------------------------------------------------------------------------------


def _mlp_forward(
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
    mode: str,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and what fc1 gave, before its activation, empty if not to be kept."""
    (
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, gate_norm_weight, gate_norm_bias, gate_weight,
        gate_bias, fc2_weight, fc2_bias,
    ) = _contiguous(
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, gate_norm_weight, gate_norm_bias, gate_weight,
        gate_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    norm, gate_norm = (norm_weight, norm_bias, eps), (gate_norm_weight, gate_norm_bias, eps)
    hidden = x.new_empty((*x.shape[:2], fc1_weight.shape[0]))
    pre = torch.empty_like(hidden) if keep else x.new_empty(0)
    run(
        plan_linear(
            x, fc1_weight, fc1_bias, norm, statistics_for(x, norm, hidden.shape[2]), "gelu",
            pre=pre if keep else None, output=hidden,
        ),
        x.device,
    )  # fmt: skip
    gated = gate_forward(*hidden.chunk(2, dim=2), gate_norm, gate_weight, gate_bias, mode)
    del hidden  # as large as two maps; its memory is free for the result
    output = torch.empty_like(x)
    run(plan_linear(gated, fc2_weight, fc2_bias, residual=x, output=output), x.device)
    return output, pre


def _fake_mlp_forward(
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
    mode: str,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    pre = x.new_empty((*x.shape[:2], fc1_weight.shape[0])) if keep else x.new_empty(0)
    return x.new_empty(x.shape), pre


def _setup_mlp_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.mode, ctx.eps, keep = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # the second output's would be as large as all that is saved
    ctx.save_for_backward(*tensors, output[1] if keep else None)


def _mlp_backward(
    grad: Tensor,
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
    pre: Tensor | None,
    mode: str,
    eps: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of the eleven tensors, an empty tensor for each that is not wanted."""
    tensors = (
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, gate_norm_weight, gate_norm_bias, gate_weight,
        gate_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    (
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, gate_norm_weight, gate_norm_bias, gate_weight,
        gate_bias, fc2_weight, _,
    ) = _contiguous(*tensors)  # fmt: skip
    grad = grad.contiguous()
    norm = (norm_weight, norm_bias, eps)
    gate_norm = (gate_norm_weight, gate_norm_bias, eps)
    of_norm = any(wanted[1:3])
    through_norm = wanted[0] or of_norm
    through_fc1 = through_norm or any(wanted[3:5])
    wants = GateWants(
        through_fc1, through_fc1, any(wanted[5:7]), wanted[7], wanted[8], gated=wanted[9], sums=wanted[4]
    )
    gradients: list[Tensor | None] = [None] * 11
    if wants.gradients or wants.gated:
        if pre is None:
            pre = x.new_empty((*x.shape[:2], fc1_weight.shape[0]))
            statistics = statistics_for(x, norm, pre.shape[2])
            run(plan_linear(x, fc1_weight, fc1_bias, norm, statistics, pre=pre), x.device)
        u, v = pre.chunk(2, dim=2)
        grad_pre = torch.empty_like(pre) if through_fc1 else None
        grad_u, grad_v = (None, None) if grad_pre is None else grad_pre.chunk(2, dim=2)
        grad_gated = None
        if wants.gradients:
            grad_gated = (flat(grad) @ fc2_weight).view(u.shape)
        found = gate_backward(
            grad_gated, u, v, gate_norm, gate_weight, gate_bias, mode, "gelu", wants, grad_u, grad_v
        )
        gradients[5:9] = found.norm_weight, found.norm_bias, found.weight, found.bias
        if wants.gated:
            gradients[9] = flat(grad).t() @ flat(found.gated)
        if wanted[4]:
            gradients[4] = torch.cat([found.u_sum, found.v_sum]).to(fc1_bias.dtype)
    normed = fc2_bias_sum = None
    if through_norm:
        grad_normed = (flat(grad_pre) @ fc1_weight).view(x.shape)
        gradients[0] = torch.empty_like(x) if wanted[0] else None
        normed = torch.empty_like(x) if wanted[3] else None
        launches, parts = plan_norm_backward(
            grad_normed, x, norm, "identity", grad, gradients[0], normed, of_norm or wanted[10]
        )
        for launch in launches:
            run(launch, x.device)
        if parts is not None:
            sums = parts.sum(1)
            gradients[1], gradients[2] = (
                vector_gradient(sums[0], norm_weight),
                vector_gradient(sums[1], norm_bias),
            )
            fc2_bias_sum = sums[2]
    elif wanted[3]:
        normed = normalised(x, norm, "identity")
    if wanted[3]:
        gradients[3] = flat(grad_pre).t() @ flat(normed)
    if wanted[10]:
        total = flat(grad).sum(0, dtype=torch.float32) if fc2_bias_sum is None else fc2_bias_sum
        gradients[10] = vector_gradient(total, fc2_bias)
    return _chosen(gradients, tensors, wanted)


def _fake_mlp_backward(
    grad: Tensor,
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
    pre: Tensor | None,
    mode: str,
    eps: float,
    wanted: list[bool],
) -> list[Tensor]:
    tensors = (
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, gate_norm_weight, gate_norm_bias, gate_weight,
        gate_bias, fc2_weight, fc2_bias,
    )  # fmt: skip
    return _empty_gradients(tensors, wanted)


def _differentiate_mlp(
    ctx: Any, backward: Any, grad: Tensor | None, grad_pre: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    wanted = list(ctx.needs_input_grad[:11])
    gradients = backward(grad, *ctx.saved_tensors, ctx.mode, ctx.eps, wanted)
    return *_sorted(gradients, wanted), None, None, None


# mlp_op(x, norm_weight, norm_bias, fc1_weight, fc1_bias, gate_norm_weight, gate_norm_bias, gate_weight,
#        gate_bias, fc2_weight, fc2_bias, mode, eps, keep) -> (result, what fc1 gave)
mlp_op = RegisteredOp(
    "degmix::gated_mlp",
    _mlp_forward,
    _fake_mlp_forward,
    _setup_mlp_context,
    _mlp_backward,
    _fake_mlp_backward,
    _differentiate_mlp,
)
