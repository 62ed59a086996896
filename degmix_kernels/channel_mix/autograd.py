"""The registered op behind ``channel_mix``: allocation, launches, and what processes tell each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from degmix_kernels import maps
from degmix_kernels.batch_norm import plan as norm_plan
from degmix_kernels.channel_mix import group as process_group
from degmix_kernels.channel_mix import plan
from degmix_kernels.launch import run
from degmix_kernels.product import input_gradient, weight_gradient
from degmix_kernels.registered import RegisteredOp
from degmix_kernels.statistics import finish_statistics


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and maps.is_channels_last(x)
    return torch.channels_last if last else torch.contiguous_format


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], weight.shape[1]).contiguous()


def _contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if vector is None else vector.contiguous() for vector in vectors]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    activation: str,
    eps: float,
    keep: bool,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result, z if kept, and the batch's mean, variance and element count where it is normalised by them.

    z, and with running statistics all the others but the result, may be empty. The count is of all processes
    of the group, and empty without a group.
    """
    output, pre, mean, variance, count = _fake_forward(
        x, weight, bias, norm_weight, norm_bias, residual, running_mean, running_var, activation, eps, keep,
        group,
    )  # fmt: skip
    memory_format = _memory_format(x)
    x, weight = x.contiguous(memory_format=memory_format), _as_matrix(weight)
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    bias, norm_weight, norm_bias = _contiguous(bias, norm_weight, norm_bias)
    if running_mean is not None:
        given = (*_contiguous(running_mean, running_var), norm_weight, norm_bias, residual, output, eps)
        run(plan.plan_forward(x, weight, bias, activation, pre if keep else None, *given), x.device)
        return output, pre, mean, variance, count
    z = pre if keep else torch.empty_like(output)
    launch, statistics = plan.plan_product(x, weight, bias, activation, z)
    run(launch, x.device)
    sizes = maps.Sizes.of(x)
    finish_statistics(statistics, sizes.pixels, mean, variance)
    if group is not None:
        mean, variance, count = process_group.combine(mean, variance, sizes.images * sizes.pixels, group)
    vectors = (mean, variance, norm_weight, norm_bias)
    run(norm_plan.plan_forward(z, *vectors, residual, output, eps, activation), x.device)
    return output, pre, mean, variance, count


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    activation: str,
    eps: float,
    keep: bool,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels = weight.shape[0]
    shape = (x.shape[0], channels, *x.shape[2:])
    output = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
    pre = torch.empty_like(output) if keep else x.new_empty(0)
    batch = running_mean is None
    mean, variance = (x.new_empty(channels if batch else 0, dtype=torch.float32) for _ in range(2))
    count = x.new_empty(0 if group is None else 1, dtype=torch.float32)
    return output, pre, mean, variance, count


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, norm_weight, norm_bias, _, running_mean, running_var, activation, eps, _, group = inputs
    _, pre, mean, variance, count = output
    batch = running_mean is None
    statistics = (mean, variance, count) if batch else (running_mean, running_var, None)
    ctx.save_for_backward(x, weight, norm_weight, pre, *statistics)
    ctx.batch, ctx.activation, ctx.eps, ctx.group = batch, activation, eps, group
    ctx.dtypes = [None if each is None else each.dtype for each in (bias, norm_weight, norm_bias)]
    if hasattr(ctx, "mark_non_differentiable"):
        ctx.mark_non_differentiable(pre, mean, variance, count)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    pre: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: Tensor | None,
    batch: bool,
    activation: str,
    eps: float,
    group: str | None,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight, bias, norm_weight and norm_bias, the vectors' in fp32; empty if not wanted."""
    results = [x.new_empty(0) for _ in range(5)]
    memory_format = _memory_format(x)
    x, grad = x.contiguous(memory_format=memory_format), grad.contiguous(memory_format=memory_format)
    matrix, (mean, variance, norm_weight) = _as_matrix(weight), _contiguous(mean, variance, norm_weight)
    norm = (mean, variance, norm_weight)
    inner = any(wanted[:3])
    sums = None
    if wanted[3] or wanted[4] or (inner and batch):
        launch, partial = norm_plan.plan_backward(grad, pre, *norm, None, True, True, eps, activation)
        run(launch, x.device)
        sums = [x.new_empty(weight.shape[0], dtype=torch.float32) for _ in range(2)]
        run(norm_plan.plan_finish(partial, variance, norm_weight, None, None, *sums, eps), x.device)
        results[3:] = [
            total if want else x.new_empty(0) for total, want in zip(sums, wanted[3:], strict=True)
        ]
    if not inner:
        return results
    sizes = maps.Sizes.of(x)
    elements = sizes.images * sizes.pixels
    if not batch:
        sums = None
    elif group is not None:
        sums, elements = process_group.mean_of(sums, count, group), 1
    grad_pre = torch.empty_like(pre)
    launch, partial = plan.plan_backward_activation(
        grad, pre, activation, *norm, sums, elements, grad_pre, wanted[2], eps
    )
    run(launch, x.device)
    if wanted[0]:
        results[0] = input_gradient(grad_pre, matrix, x)
    if wanted[1]:
        results[1] = weight_gradient(grad_pre, matrix, x).view_as(weight)
    if wanted[2]:
        results[2] = partial.sum(0)
    return results


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    pre: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: Tensor | None,
    batch: bool,
    activation: str,
    eps: float,
    group: str | None,
    wanted: list[bool],
) -> list[Tensor]:
    channels = weight.shape[0]
    like_x = torch.empty_like(x, memory_format=_memory_format(x)) if wanted[0] else x.new_empty(0)
    like_weight = x.new_empty(weight.shape if wanted[1] else 0)
    vectors = (x.new_empty(channels, dtype=torch.float32) if want else x.new_empty(0) for want in wanted[2:])
    return [like_x, like_weight, *vectors]


def _differentiate(
    ctx: Any, backward: Any, grad: Tensor, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:5])
    gradients = [None] * 5
    if any(wanted):
        settings = (ctx.batch, ctx.activation, ctx.eps, ctx.group)
        computed = backward(grad, *ctx.saved_tensors, *settings, wanted)
        dtypes = [grad.dtype, grad.dtype, *ctx.dtypes]
        gradients = [
            gradient.to(dtype) if want else None
            for gradient, dtype, want in zip(computed, dtypes, wanted, strict=True)
        ]
    return *gradients, grad if ctx.needs_input_grad[5] else None, *[None] * 6


# mix_op(x, weight, bias, norm_weight, norm_bias, residual, running_mean, running_var, activation, eps, keep,
#        group) -> (result, z, mean, variance, count)
mix_op = RegisteredOp(
    "degmix::channel_mix",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    _fake_backward,
    _differentiate,
)
