"""Attention over all tokens without softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from degmix_kernels import backend, maps
from degmix_kernels.attention import reference
from degmix_kernels.attention.op import check_shapes, empty_like, missing
from degmix_kernels.define import define
from degmix_kernels.launch import run

if backend.HAS_TRITON:
    from degmix_kernels.attention import linear_plan


class LinearCall(NamedTuple):
    """Arguments of :func:`linear_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


def linear_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention without softmax, ``Q (Kᵀ V) · scale``: linear in the number of tokens.

    Kᵀ V is summed in fp32 and takes the scale. Triton kernels take heads of up to 128 channels; wider ones
    run the reference on every device.

    Under autocast all tensors are cast to the autocast dtype, which the result has; doubles are left alone.

    Args:
        query: (B, heads, N, D), floating point.
        key: (B, heads, M, D), M at least 1.
        value: (B, heads, M, D).
        scale: factor on the result; 1/√D in DeGMix.

    Returns:
        (B, heads, N, D), in the dtype of ``query``.

    Raises:
        TypeError: for a wrong type, dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows DeGMix, arXiv 2308.05721, as in its authors' later program.
    """
    call = linear_op.checked(query, key, value, scale)
    check_shapes(call.query, call.key, call.value)
    if linear_op.runs_triton(call, missing(call.query)):
        return linear_op(call)[0]
    return reference.linear_attention(*call)


def _outputs(call: LinearCall) -> tuple[Tensor, Tensor]:
    """The result, and Kᵀ V · scale in fp32."""
    query = call.query
    batch, heads, _, head_dim = query.shape
    return empty_like(query), query.new_empty(batch, heads, head_dim, head_dim, dtype=torch.float32)


def _forward(call: LinearCall, output: Tensor, context: Tensor) -> None:
    torch.sum(_token_products(call.key, call.value, call.scale), 2, out=context)
    _apply_matrix(call.query, context, False, output)


def _backward(
    call: LinearCall, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: LinearCall
) -> dict[str, Tensor]:
    query, key, value, scale = call
    (grad,), (context,) = grads, kept
    gradients = {}
    if wanted.query:
        gradients["query"] = _apply_matrix(grad, context, True, empty_like(query))
    if wanted.key or wanted.value:
        grad_context = _token_products(query, grad, scale).sum(2)
        if wanted.key:
            gradients["key"] = _apply_matrix(value, grad_context, True, empty_like(key))
        if wanted.value:
            gradients["value"] = _apply_matrix(key, grad_context, False, empty_like(value))
    return gradients


def _token_products(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """leftᵀ · right · scale over the tokens of each head, in parts: (B, heads, parts, D, D), fp32."""
    launch, parts = linear_plan.plan_multiply_tokens(maps.readable(left), maps.readable(right), scale)
    run(launch, left.device)
    return parts


def _apply_matrix(tokens: Tensor, matrix: Tensor, transposed: bool, output: Tensor) -> Tensor:
    """tokens · matrix, or matrixᵀ, in ``output``."""
    run(linear_plan.plan_apply_matrix(maps.readable(tokens), matrix, transposed, output), output.device)
    return output


def _products(call: LinearCall) -> int:
    """2 · B · heads · (M + N) · D · D: Kᵀ V, and Q times it."""
    return 2 * (call.query.numel() + call.key.numel()) * call.query.shape[3]


linear_op = define(
    "linear_attention",
    LinearCall,
    _outputs,
    _forward,
    _backward,
    products=_products,
    backward_products=2,  # Kᵀ V is small enough to be kept
    beside=1,
    like=empty_like,
)
