"""What the prototypes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.harness.case import Unavailable

FP32 = torch.float32
LAST = {"memory_format": torch.channels_last}


def with_backward(
    forward: Callable[..., tuple[Tensor, Sequence[Tensor]]], backward: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., Tensor]:
    """An op of ours with a prototype's backward pass, which alone is measured.

    Args:
        forward: ``forward(*inputs)`` returns the result and what the backward pass reads.
        backward: ``backward(grad, *kept)`` returns the inputs' gradients.
    """

    class Prototype(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            result, kept = forward(*inputs)
            ctx.save_for_backward(*kept)
            return result

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            return backward(grad, *ctx.saved_tensors)

    def apply(*inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise Unavailable("its forward pass is ours")
        return Prototype.apply(*inputs)

    return apply


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` with an fp32 result."""
    multiply = torch.bmm if left.dim() == 3 else torch.mm
    if left.device.type == "cpu":  # where PyTorch has no such product
        return multiply(left.float(), right.float())
    return multiply(left, right, out_dtype=FP32)
