"""The registered op behind ``task_attention``: allocation and launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from degmix_kernels.launch import run
from degmix_kernels.registered import RegisteredOp
from degmix_kernels.task_attention.plan import plan_backward, plan_forward


def _readable(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, as the kernels need it, else a copy."""
    return tensor if tensor.shape[3] == 1 or tensor.stride(3) == 1 else tensor.contiguous()


def _forward(query: Tensor, key: Tensor, value: Tensor | None, heads: int, scale: float) -> Tensor:
    output = _fake_forward(query, key, value, heads, scale)
    query, key = _readable(query), _readable(key)
    value = None if value is None else _readable(value)
    run(plan_forward(query, key, value, output, heads, scale), query.device)
    return output


def _dense(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_forward(query: Tensor, key: Tensor, value: Tensor | None, heads: int, scale: float) -> Tensor:
    return _dense(query)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.heads, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    heads: int,
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of query, key and value; an empty tensor if unwanted."""
    results = _fake_backward(grad, query, key, value, heads, scale, wanted)
    grad, query, key = _readable(grad), _readable(query), _readable(key)
    value = None if value is None else _readable(value)
    gradients = (result if want else None for result, want in zip(results, wanted, strict=True))
    run(plan_backward(grad, query, key, value, *gradients, heads, scale), query.device)
    return results


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    heads: int,
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    return [
        _dense(tensor) if want else query.new_empty(0)
        for tensor, want in zip((query, key, value), wanted, strict=True)
    ]


def _differentiate(ctx: Any, backward: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    computed = backward(grad, *ctx.saved_tensors, ctx.heads, ctx.scale, wanted)
    gradients = (gradient if want else None for gradient, want in zip(computed, wanted, strict=True))
    return *gradients, None, None


# attention_op(query, key, value, heads, scale)
attention_op = RegisteredOp(
    "degmix::task_attention",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    _fake_backward,
    _differentiate,
)
