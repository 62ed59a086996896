"""The registered op behind ``batch_norm``: allocation and launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from degmix_kernels import layout
from degmix_kernels.batch_norm.plan import plan_backward, plan_finish, plan_forward
from degmix_kernels.launch import run
from degmix_kernels.registered import RegisteredOp


def _memory_format(x: Tensor) -> torch.memory_format:
    """The layout the kernels use for x and all that is shaped like it."""
    last = x.dim() == 4 and layout.is_channels_last(x)
    return torch.channels_last if last else torch.contiguous_format


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _forward(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    memory_format = _memory_format(x)
    x = x.contiguous(memory_format=memory_format)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    output = torch.empty_like(x)
    vectors = (_contiguous(vector) for vector in (mean, variance, weight, bias))
    run(plan_forward(x, *vectors, residual, output, eps), x.device)
    return output


def _fake_forward(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    return torch.empty_like(x, memory_format=_memory_format(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, eps = inputs
    ctx.save_for_backward(*tensors[:4])
    ctx.eps = eps
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]


def _backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    eps: float,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of x, mean, variance, weight and bias, the vectors' in fp32; an empty tensor if unwanted."""
    results = _fake_backward(grad, x, mean, variance, weight, eps, wanted)
    memory_format = _memory_format(x)
    x, grad = x.contiguous(memory_format=memory_format), grad.contiguous(memory_format=memory_format)
    mean, variance, weight = _contiguous(mean), _contiguous(variance), _contiguous(weight)
    grad_x, *vectors = (result if want else None for result, want in zip(results, wanted, strict=True))
    sums, products = any(wanted[1:]), wanted[2] or wanted[3]
    if grad_x is None and not sums:
        return results
    plan, partial = plan_backward(grad, x, mean, variance, weight, grad_x, sums, products, eps)
    run(plan, x.device)
    if sums:
        run(plan_finish(partial, variance, weight, *vectors, eps), x.device)
    return results


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    eps: float,
    wanted: list[bool],
) -> list[Tensor]:
    like = torch.empty_like(x, memory_format=_memory_format(x)) if wanted[0] else x.new_empty(0)
    vectors = (x.new_empty(x.shape[1] if want else 0, dtype=torch.float32) for want in wanted[1:])
    return [like, *vectors]


def _differentiate(ctx: Any, backward: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:5])
    gradients = [None] * 5
    if any(wanted):
        computed = backward(grad, *ctx.saved_tensors, ctx.eps, wanted)
        gradients = [
            gradient.to(dtype) if want else None
            for gradient, dtype, want in zip(computed, ctx.dtypes, wanted, strict=True)
        ]
    return *gradients, grad if ctx.needs_input_grad[5] else None, None


# norm_op(x, mean, variance, weight, bias, residual, eps)
norm_op = RegisteredOp(
    "degmix::batch_norm",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    _fake_backward,
    _differentiate,
)
