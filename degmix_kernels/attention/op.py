"""Softmax attention over all tokens, gated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from degmix_kernels import backend, checks, maps
from degmix_kernels.attention import reference
from degmix_kernels.define import define
from degmix_kernels.launch import run

if backend.HAS_TRITON:
    from degmix_kernels.attention import plan

LARGEST_HEAD_DIM = 128  # of the kernels, whose tiles hold all channels of a head


class GatedCall(NamedTuple):
    """Arguments of :func:`gated_attention`, and whether to keep what a backward pass reads."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None
    residual: Tensor | None
    keep: bool


def gated_attention(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Softmax attention over all tokens, gated: ``softmax(Q Kᵀ / √D) V ⊙ gate + residual``.

    Triton never forms the N×M matrix; its kernels take heads of up to 128 channels, wider ones run the
    reference, PyTorch's ``scaled_dot_product_attention`` in fp32, on every device.

    Under autocast all tensors are cast to the autocast dtype, which the result has; doubles are left alone.

    Args:
        query: (B, heads, N, D), floating point.
        key: (B, heads, M, D), M at least 1.
        value: (B, heads, M, D).
        gate: (B, heads, N, D), multiplied onto the attended values.
        residual: (B, heads, N, D), added last.

    Returns:
        (B, heads, N, D), in the dtype of ``query``.

    Raises:
        TypeError: for a wrong type, dtype or device.
        ValueError: for a wrong shape.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Vaswani et al., arXiv 1706.03762, equation 1; the gate as in Qiu et al., arXiv 2505.06708.
    """
    call = gated_op.checked(query, key, value, gate, residual, True)
    check_shapes(call.query, call.key, call.value)
    checks.expect_shape("gate", call.gate, call.query.shape)
    checks.expect_shape("residual", call.residual, call.query.shape)
    if gated_op.runs_triton(call, missing(call.query)):
        return gated_op(call)[0]
    return reference.gated_attention(*tuple(call)[:5])


def _outputs(call: GatedCall) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the attended values before gate and residual, the logarithm of the weights' sum.

    The last two are empty if not to be kept. Attended values that are the result are empty, too.
    """
    query, _, _, gate, residual, keep = call
    output = empty_like(query)
    apart = keep and (gate is not None or residual is not None)
    attended = torch.empty_like(output) if apart else query.new_empty(0)
    return output, attended, query.new_empty(query.shape[:3] if keep else 0, dtype=torch.float32)


def _keeps(call: GatedCall, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    output, attended, log_sum = outputs
    return output if call.gate is None and call.residual is None else attended, log_sum


def _forward(call: GatedCall, output: Tensor, attended: Tensor, log_sum: Tensor) -> None:
    query, key, value, gate, residual, keep = call
    launch = plan.plan_forward(
        *map(maps.readable, (query, key, value)),
        _laid_out_as(output, gate),
        _laid_out_as(output, residual),
        output,
        attended if attended.dim() == 4 else None,
        log_sum if keep else None,
    )
    run(launch, output.device)


def _backward(
    call: GatedCall, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: GatedCall
) -> dict[str, Tensor | None]:
    attended, log_sum = kept
    grad, gate = _laid_out_as(attended, grads[0]), _laid_out_as(attended, call.gate)
    query, key, value = map(maps.readable, call[:3])
    scores = wanted.query or wanted.key  # otherwise their gradient is of no use
    delta = torch.empty_like(log_sum) if scores else None
    grad_gate = torch.empty_like(attended) if wanted.gate else None
    grad_attended = torch.empty_like(attended) if gate is not None and any(wanted[:3]) else None
    if grad_gate is not None or grad_attended is not None or delta is not None:
        run(plan.plan_prepare(grad, gate, attended, grad_gate, grad_attended, delta), grad.device)
    grad = grad if grad_attended is None else grad_attended
    grad_query = torch.empty_like(attended) if wanted.query else None
    if grad_query is not None:
        launch = plan.plan_backward_query(query, key, value, grad, log_sum, delta, grad_query)
        run(launch, grad.device)
    # Keys and values are written by one kernel, in one layout.
    grad_key, grad_value = (empty_like(call.key) if want else None for want in wanted[1:3])
    if grad_key is not None or grad_value is not None:
        launch = plan.plan_backward_context(query, key, value, grad, log_sum, delta, grad_key, grad_value)
        run(launch, grad.device)
    return {
        "query": _as_gradient(call.query, grad_query),
        "key": grad_key,
        "value": _as_gradient(call.value, grad_value),
        "gate": _as_gradient(call.gate, grad_gate),
    }


def empty_like(tokens: Tensor) -> Tensor:
    """A dense (B, heads, N, D), uninitialised, its heads inside the tokens if they are in ``tokens``.

    The result of what a module split into heads then has heads that join without a copy.
    """
    if not _heads_inside(tokens):
        return tokens.new_empty(tokens.shape)
    batch, heads, length, head_dim = tokens.shape
    return tokens.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless these are (B, heads, N, D) and two of (B, heads, M, D), none of them without heads."""
    checks.expect(query.dim() == 4, "query", "4 dimensions", query.shape)
    batch, heads, _, head_dim = query.shape
    checks.expect(head_dim > 0 and heads > 0, "query", "at least one head and channel", query.shape)
    checks.expect(key.dim() == 4, "key", "4 dimensions", key.shape)
    length = key.shape[2]
    checks.expect(length > 0, "key", "at least one token", key.shape)
    checks.expect_shape("key", key, (batch, heads, length, head_dim))
    checks.expect_shape("value", value, (batch, heads, length, head_dim))


def missing(query: Tensor) -> str:
    """What has no Triton kernel: heads with more channels than a tile can hold."""
    return f"head dimension above {LARGEST_HEAD_DIM}" if query.shape[3] > LARGEST_HEAD_DIM else ""


def _heads_inside(tokens: Tensor) -> bool:
    _, head, token, _ = tokens.stride()
    return head < token and tokens.shape[1] > 1


def _laid_out_as(like: Tensor, tokens: Tensor | None) -> Tensor | None:
    """The tokens in exactly the layout of a tensor of their shape: a copy only if they have another."""
    if tokens is None or tokens.stride() == like.stride():
        return tokens
    return torch.empty_like(like, dtype=tokens.dtype).copy_(tokens)


def _as_gradient(tokens: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The dense gradient laid out as ``empty_like(tokens)``: a copy only if it has another layout."""
    if gradient is None or gradient.stride() == tokens.stride():
        return gradient
    if _heads_inside(gradient) == _heads_inside(tokens):
        return gradient
    return empty_like(tokens).copy_(gradient)


def _products(call: GatedCall) -> int:
    """2 · 2 · B · heads · N · M · D: Q Kᵀ, and its softmax times V."""
    return 4 * call.query.numel() * call.key.shape[2]


gated_op = define(
    "gated_attention",
    GatedCall,
    _outputs,
    _forward,
    _backward,
    products=_products,
    backward_products=2.5,
    beside=2,
    keeps=_keeps,
    passed_on=("residual",),
    like=empty_like,
)
