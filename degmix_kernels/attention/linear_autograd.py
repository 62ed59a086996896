"""The registered op behind ``linear_attention``: allocation and launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from degmix_kernels.attention.linear_plan import plan_apply_matrix, plan_multiply_tokens
from degmix_kernels.attention.plan import empty_like, readable
from degmix_kernels.launch import run
from degmix_kernels.registered import RegisteredOp


def _multiply_tokens(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """leftᵀ · right · scale over the tokens of each head, (B, heads, D, D), fp32."""
    plan, parts = plan_multiply_tokens(readable(left), readable(right), scale)
    run(plan, left.device)
    return parts.sum(2)


def _apply_matrix(tokens: Tensor, matrix: Tensor, transposed: bool, output: Tensor) -> None:
    """Fill ``output`` with tokens · matrix, or matrixᵀ."""
    run(plan_apply_matrix(readable(tokens), matrix, transposed, output), tokens.device)


def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and Kᵀ V · scale in fp32."""
    context = _multiply_tokens(key, value, scale)
    output = empty_like(query)
    _apply_matrix(query, context, False, output)
    return output, context


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, _, head_dim = query.shape
    return empty_like(query), query.new_empty(batch, heads, head_dim, head_dim, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.save_for_backward(query, key, value, output[1])
    ctx.scale = scale


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of query, key and value; an empty tensor if unwanted."""
    results = grad_query, grad_key, grad_value = _fake_backward(
        grad, query, key, value, context, scale, wanted
    )
    if wanted[0]:
        _apply_matrix(grad, context, True, grad_query)
    if wanted[1] or wanted[2]:
        grad_context = _multiply_tokens(query, grad, scale)
        if wanted[1]:
            _apply_matrix(value, grad_context, True, grad_key)
        if wanted[2]:
            _apply_matrix(key, grad_context, False, grad_value)
    return results


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    return [
        empty_like(tensor) if want else tensor.new_empty(0)
        for tensor, want in zip((query, key, value), wanted, strict=True)
    ]


def _differentiate(ctx: Any, backward: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    gradients = [None] * 3
    if any(wanted):
        computed = backward(grad, *ctx.saved_tensors, ctx.scale, wanted)
        gradients = [gradient if want else None for gradient, want in zip(computed, wanted, strict=True)]
    return *gradients, None


# linear_op(query, key, value, scale)
linear_op = RegisteredOp(
    "degmix::linear_attention",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    _fake_backward,
    _differentiate,
)
