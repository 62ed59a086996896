"""The registered op behind ``gated_attention``: allocation and launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from degmix_kernels.attention.plan import (
    empty_like,
    laid_out_as,
    plan_backward_context,
    plan_backward_query,
    plan_forward,
    plan_prepare,
    readable,
)
from degmix_kernels.launch import run
from degmix_kernels.registered import RegisteredOp


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the attended values before gate and residual, the logarithm of the weights' sum.

    Without ``save`` the last two are empty; attended values that are the result are, too.
    """
    results = output, attended, log_sum = _fake_forward(query, key, value, gate, residual, save)
    plan = plan_forward(
        *map(readable, (query, key, value)),
        laid_out_as(gate, output),
        laid_out_as(residual, output),
        output,
        attended if attended.dim() == 4 else None,
        log_sum if save else None,
    )
    run(plan, query.device)
    return results


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output = empty_like(query)
    separate = save and (gate is not None or residual is not None)
    attended = torch.empty_like(output) if separate else query.new_empty(0)
    log_sum = query.new_empty(query.shape[:3] if save else 0, dtype=torch.float32)
    return output, attended, log_sum


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, gate, residual, save = inputs
    result, attended, log_sum = output
    ctx.mark_non_differentiable(attended, log_sum)
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    if save:
        attended = result if gate is None and residual is None else attended
        ctx.save_for_backward(query, key, value, gate, attended, log_sum)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    attended: Tensor,
    log_sum: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, value and gate; an empty tensor if unwanted."""
    results = _fake_backward(grad, query, key, value, gate, attended, log_sum, wanted)
    grad_query, grad_key, grad_value, grad_gate = (
        result if want else None for result, want in zip(results, wanted, strict=True)
    )
    grad, gate = laid_out_as(grad, attended), laid_out_as(gate, attended)
    scores = wanted[0] or wanted[1]  # otherwise their gradient is of no use
    delta = torch.empty_like(log_sum) if scores else None
    grad_attended = torch.empty_like(attended) if gate is not None and any(wanted[:3]) else None
    if grad_gate is not None or grad_attended is not None or delta is not None:
        run(plan_prepare(grad, gate, attended, grad_gate, grad_attended, delta), grad.device)
    grad = grad if grad_attended is None else grad_attended
    query, key, value = map(readable, (query, key, value))
    if grad_query is not None:
        run(plan_backward_query(query, key, value, grad, log_sum, delta, grad_query), grad.device)
    if grad_key is not None or grad_value is not None:
        run(
            plan_backward_context(query, key, value, grad, log_sum, delta, grad_key, grad_value),
            grad.device,
        )
    return results


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    attended: Tensor,
    log_sum: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    like = (query, key, key, query)  # keys and values are written by one kernel, in one layout
    return [
        empty_like(tensor) if want else query.new_empty(0) for tensor, want in zip(like, wanted, strict=True)
    ]


def _differentiate(ctx: Any, backward: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    gradients = [None] * 4
    if any(wanted):
        computed = backward(grad, *ctx.saved_tensors, wanted)
        gradients = [gradient if want else None for gradient, want in zip(computed, wanted, strict=True)]
    return *gradients, grad if ctx.needs_input_grad[4] else None, None


# attention_op(query, key, value, gate, residual, save)
attention_op = RegisteredOp(
    "degmix::gated_attention",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    _fake_backward,
    _differentiate,
)
