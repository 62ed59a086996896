"""The registered ops behind ``deform_conv2d`` and ``deform_mix``: what they save, and how gradients flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from degmix_kernels import maps
from degmix_kernels.deform_conv.execution import (
    copied_bytes,
    empty_gradients,
    empty_output,
    fill_gradients,
    make_problem,
    parts,
    readable,
)
from degmix_kernels.epilogue import Epilogue
from degmix_kernels.launch import run
from degmix_kernels.registered import RegisteredOp
from degmix_kernels.statistics import finish_statistics

# --- deform_conv2d -----------------------------------------------------------------------------------------


def _forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride_y: int,
    stride_x: int,
    padding_y: int,
    padding_x: int,
    dilation_y: int,
    dilation_x: int,
) -> Tensor:
    geometry = (stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
    output = empty_output(input, offset, weight)
    problem, path = make_problem(input, offset, weight, mask, geometry)
    bias = None if bias is None else bias.contiguous()
    for part, images in parts(problem, copied_bytes(problem, path)):
        run(path.plan_forward(readable(part, path), bias, output[images]), input.device)
    return output


def _fake_forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *geometry: int,
) -> Tensor:
    return empty_output(input, offset, weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, _, mask, *geometry = inputs
    ctx.save_for_backward(input, offset, weight, mask)
    ctx.geometry = geometry
    # The user may have left the region that asked for it by the time the backward pass runs.
    ctx.deterministic = torch.are_deterministic_algorithms_enabled()


def _backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride_y: int,
    stride_x: int,
    padding_y: int,
    padding_x: int,
    dilation_y: int,
    dilation_x: int,
    wanted: list[bool],
    deterministic: bool,
) -> list[Tensor]:
    """Gradients of input, offset, weight, bias and mask, an empty tensor for each that is not wanted."""
    geometry = (stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
    results = empty_gradients(input, offset, weight, mask, wanted)
    problem, path = make_problem(input, offset, weight, mask, geometry)
    fill_gradients(problem, path, grad, None, results, wanted, deterministic)
    return results


def _fake_backward(
    grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *rest: Any
) -> list[Tensor]:
    return empty_gradients(input, offset, weight, mask, rest[-2])


def _differentiate(ctx: Any, backward: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:5])
    gradients = backward(grad, input, offset, weight, mask, *ctx.geometry, wanted, ctx.deterministic)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 6


# conv_op(input, offset, weight, bias, mask, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
conv_op = RegisteredOp(
    "degmix::deform_conv2d",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    _fake_backward,
    _differentiate,
)


# --- deform_mix --------------------------------------------------------------------------------------------

_POINTWISE = (1, 1, 0, 0, 1, 1)  # stride, padding, dilation


def _mix_forward(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    keep: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, its value before the activation, its mean and its variance, empty if not to be kept."""
    output, pre, mean, variance = _fake_mix_forward(x, offset, weight, bias, activation, keep, statistics)
    problem, path = make_problem(x, offset, weight, None, _POINTWISE)
    blocks = path.new_statistics(problem) if statistics else None
    bias = None if bias is None else bias.contiguous()
    run(
        path.plan_forward(readable(problem, path), bias, output, activation, pre if keep else None, blocks),
        x.device,
    )
    if blocks is not None:
        finish_statistics(blocks, problem.out_pixels, mean, variance)
    return output, pre, mean, variance


def _fake_mix_forward(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    keep: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def vector() -> Tensor:
        return x.new_empty(weight.shape[0] if statistics else 0, dtype=torch.float32)

    output = empty_output(x, offset, weight)
    return output, torch.empty_like(output) if keep else x.new_empty(0), vector(), vector()


def _setup_mix_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, offset, weight, _, activation, _, statistics = inputs
    _, pre, mean, _ = output
    ctx.save_for_backward(x, offset, weight, pre, mean if statistics else None)
    ctx.set_materialize_grads(False)
    ctx.activation = activation
    ctx.deterministic = torch.are_deterministic_algorithms_enabled()


def _mix_backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    pre: Tensor,
    mean: Tensor | None,
    activation: str,
    wanted: list[bool],
    deterministic: bool,
) -> list[Tensor]:
    """Gradients of x, offset, weight and bias, an empty tensor for each that is not wanted."""
    results = _fake_mix_backward(
        grad, grad_mean, grad_variance, x, offset, weight, pre, mean, activation, wanted, deterministic
    )
    problem, path = make_problem(x, offset, weight, None, _POINTWISE)
    grad = torch.zeros_like(pre) if grad is None else grad
    # The kernels address the gradient as they address z.
    grad = grad.contiguous(
        memory_format=torch.channels_last if maps.is_channels_last(pre) else torch.contiguous_format
    )
    # y's own gradient is grad + ∂/∂y (grad_mean · mean + grad_variance · variance), linear in y.
    count = max(problem.batch * problem.out_pixels, 1)
    constant = linear = None
    if grad_variance is not None:
        linear = 2 / count * grad_variance
        constant = -linear * mean
    if grad_mean is not None:
        constant = grad_mean / count + (0 if constant is None else constant)
    epilogue = Epilogue(activation, pre, constant, linear)
    fill_gradients(problem, path, grad, epilogue, [*results, grad], [*wanted, False], deterministic)
    return results


def _fake_mix_backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    pre: Tensor,
    mean: Tensor | None,
    activation: str,
    wanted: list[bool],
    deterministic: bool,
) -> list[Tensor]:
    return empty_gradients(x, offset, weight, None, [*wanted, False])[:4]


def _differentiate_mix(
    ctx: Any,
    backward: Any,
    grad: Tensor | None,
    grad_pre: Tensor | None,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
) -> tuple[Tensor | None, ...]:
    x, offset, weight, pre, mean = ctx.saved_tensors
    if mean is None:
        grad_mean = grad_variance = None
    wanted = list(ctx.needs_input_grad[:4])
    gradients = backward(
        grad, grad_mean, grad_variance, x, offset, weight, pre, mean, ctx.activation, wanted,
        ctx.deterministic,
    )  # fmt: skip
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None, None


# mix_op(x, offset, weight, bias, activation, keep, statistics) -> (result, z, mean, variance)
mix_op = RegisteredOp(
    "degmix::deform_mix",
    _mix_forward,
    _fake_mix_forward,
    _setup_mix_context,
    _mix_backward,
    _fake_mix_backward,
    _differentiate_mix,
)
