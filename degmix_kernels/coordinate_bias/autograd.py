"""The registered op behind ``coordinate_bias``: allocation, the launch, and the gradients' sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from degmix_kernels import maps
from degmix_kernels.coordinate_bias.plan import plan_forward
from degmix_kernels.launch import run
from degmix_kernels.registered import RegisteredOp


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if maps.is_channels_last(x) else torch.contiguous_format


def _forward(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    x = x.contiguous(memory_format=_memory_format(x))
    output = torch.empty_like(x)
    run(plan_forward(x, rows.contiguous(), columns.contiguous(), output), x.device)
    return output


def _fake_forward(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_memory_format(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, rows, columns = inputs
    ctx.groups, ctx.row_channels, ctx.dtypes = rows.shape[0], rows.shape[1], (rows.dtype, columns.dtype)


def _backward(grad: Tensor, groups: int, row_channels: int, wanted: list[bool]) -> list[Tensor]:
    """Gradients of rows and columns, fp32; an empty tensor if unwanted."""
    grad = grad.unflatten(1, (groups, -1))
    tables = ((grad[:, :, :row_channels], 4), (grad[:, :, row_channels:], 3))
    return [
        _sum_middle(part, axis) if want else grad.new_empty(0)
        for (part, axis), want in zip(tables, wanted, strict=True)
    ]


def _sum_middle(grad: Tensor, axis: int) -> Tensor:
    """Sum over images, and along an axis but for its first and last slice; fp32."""
    size = grad.shape[axis]
    if size <= 3:
        return grad.sum(0, dtype=torch.float32)
    parts = grad.split([1, size - 2, 1], axis)
    return torch.stack([part.sum((0, axis), dtype=torch.float32) for part in parts], axis - 1)


def _fake_backward(grad: Tensor, groups: int, row_channels: int, wanted: list[bool]) -> list[Tensor]:
    _, channels, height, width = grad.shape
    shapes = (
        (groups, row_channels, height, min(width, 3)),
        (groups, channels // groups - row_channels, min(height, 3), width),
    )
    return [
        grad.new_empty(shape, dtype=torch.float32) if want else grad.new_empty(0)
        for shape, want in zip(shapes, wanted, strict=True)
    ]


def _differentiate(ctx: Any, backward: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[1:])
    tables = [None, None]
    if any(wanted):
        computed = backward(grad, ctx.groups, ctx.row_channels, wanted)
        tables = [
            each.to(dtype) if want else None
            for each, dtype, want in zip(computed, ctx.dtypes, wanted, strict=True)
        ]
    return grad if ctx.needs_input_grad[0] else None, *tables


# bias_op(x, rows, columns)
bias_op = RegisteredOp(
    "degmix::coordinate_bias",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    _fake_backward,
    _differentiate,
)
