"""The registered op behind ``linear_norm``: allocation and launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from degmix_kernels import maps
from degmix_kernels.launch import run
from degmix_kernels.linear_norm.plan import plan_backward, plan_forward
from degmix_kernels.product import input_gradient, weight_gradient
from degmix_kernels.registered import RegisteredOp


def _rows(tensor: Tensor | None, x: Tensor, blocks: int = 1) -> Tensor | None:
    """Tokens as (blocks, tokens, channels); maps laid out as x, or contiguous if it is in neither layout."""
    if tensor is None:
        return None
    if tensor.dim() == 3:
        batch, tokens, channels = tensor.shape
        return tensor.reshape(blocks, batch // blocks * tokens, channels).contiguous()
    return tensor.contiguous(memory_format=_memory_format(x))


def _blocks(parameter: Tensor | None, dims: int) -> Tensor | None:
    """A parameter of ``dims`` dimensions for one block, contiguous, with an axis for blocks in front."""
    if parameter is None:
        return None
    parameter = parameter.contiguous()
    return parameter if parameter.dim() > dims else parameter[None]


def _memory_format(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and maps.is_channels_last(x)
    return torch.channels_last if last else torch.contiguous_format


def _empty_result(x: Tensor, channels: int) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:]) if x.dim() == 4 else (*x.shape[:2], channels)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    addend: Tensor | None,
    residual: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, x̂, and 1 / √(variance + eps) of every pixel, the latter two empty if not to be kept."""
    results = _fake_forward(x, weight, bias, norm_weight, norm_bias, addend, residual, eps, keep)
    output, normed, deviation = results
    weight = _blocks(weight, 2)
    vectors = (_blocks(vector, 1) for vector in (bias, norm_weight, norm_bias))
    maps = (_rows(each, x, len(weight)) for each in (addend, residual, output, normed if keep else None))
    rows = _rows(x, x, len(weight))
    run(plan_forward(rows, weight, *vectors, *maps, deviation if keep else None, eps), x.device)
    return results


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    addend: Tensor | None,
    residual: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output = _empty_result(x, weight.shape[-2])
    pixels = x.shape[0] * (x.shape[2] * x.shape[3] if x.dim() == 4 else x.shape[1])
    deviation = x.new_empty(pixels if keep else 0, dtype=torch.float32)
    return output, torch.empty_like(output) if keep else x.new_empty(0), deviation


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, norm_weight, norm_bias, *_ = inputs
    _, normed, deviation = output
    ctx.save_for_backward(x, weight, norm_weight, normed, deviation)
    ctx.dtypes = [None if each is None else each.dtype for each in (bias, norm_weight, norm_bias)]
    ctx.set_materialize_grads(False)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    normed: Tensor,
    deviation: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight, bias, norm_weight, norm_bias (the vectors' in fp32) and addend; or empty."""
    results = [x.new_empty(0) for _ in range(6)]
    inner = any(wanted[:3]) or wanted[5]
    grad_pre = torch.empty_like(normed) if inner else None
    norm_weight = _blocks(norm_weight, 1)
    blocks = len(norm_weight)
    rows = _rows(grad_pre, x, blocks)
    launch, sums = plan_backward(
        _rows(grad, x, blocks), _rows(normed, x, blocks), deviation, norm_weight, rows
    )
    run(launch, x.device)
    x_rows = _rows(x, x, blocks)
    if wanted[0] and x.dim() == 4:
        results[0] = input_gradient(rows, weight, x_rows)
    elif wanted[0]:
        results[0] = torch.bmm(rows, _blocks(weight, 2)).view(x.shape)
    if wanted[1] and x.dim() == 4:
        results[1] = weight_gradient(rows, weight, x_rows)
    elif wanted[1]:
        results[1] = torch.bmm(rows.mT, x_rows).view(weight.shape)
    if any(wanted[2:5]):
        totals = sums.sum(2).view(3, *weight.shape[:-1])
        # In the kernel's order: norm_weight, norm_bias, bias.
        for index, total in ((3, 0), (4, 1), (2, 2)):
            if wanted[index]:
                results[index] = totals[total].clone()
    if wanted[5]:
        results[5] = grad_pre
    return results


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    normed: Tensor,
    deviation: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    like_x = torch.empty_like(x, memory_format=_memory_format(x)) if wanted[0] else x.new_empty(0)
    like_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    shape = weight.shape[:-1]
    vectors = (x.new_empty(shape, dtype=torch.float32) if want else x.new_empty(0) for want in wanted[2:5])
    addend = torch.empty_like(normed) if wanted[5] else x.new_empty(0)
    return [like_x, like_weight if wanted[1] else x.new_empty(0), *vectors, addend]


def _differentiate(ctx: Any, backward: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:6])
    gradients = [None] * 6
    if any(wanted) and grad is not None:
        computed = backward(grad, *ctx.saved_tensors, wanted)
        dtypes = [grad.dtype, grad.dtype, *ctx.dtypes, grad.dtype]
        gradients = [
            gradient.to(dtype) if want else None
            for gradient, dtype, want in zip(computed, dtypes, wanted, strict=True)
        ]
    return *gradients, grad if ctx.needs_input_grad[6] else None, None, None


# norm_op(x, weight, bias, norm_weight, norm_bias, addend, residual, eps, keep) -> (result, x̂, deviation)
norm_op = RegisteredOp(
    "degmix::linear_norm",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    _fake_backward,
    _differentiate,
)
