"""What several sections share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.cases.deform_conv import load_torchvision
from bench.cases.shapes import QUICK_MAP
from bench.gpu.decide.meter import Meter
from bench.harness.case import Unavailable
from degmix.model.mixer import Offsets

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAST = {"memory_format": torch.channels_last}
TF32 = FP16  # whose significand TF32 has
SMALL_MAP = replace(QUICK_MAP, channels=4, height=5, width=7)  # for the interpreter

Arguments = Mapping[str, Any]


def with_grad(
    arguments: Arguments, wanted: Sequence[str], dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """The same arguments, of which the wanted are leaves; floating-point ones cast to a dtype, if given."""
    return {
        name: value.detach().to(dtype or value.dtype).requires_grad_(name in wanted)
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def backward(
    function: Callable[..., Any],
    arguments: Arguments,
    wanted: Sequence[str],
    grads: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> Callable[[], tuple[Tensor, ...]]:
    """A backward pass that can be repeated: the gradients of the wanted arguments.

    Its forward pass runs when the first gradients are asked for, so what fails there fails as the step does.
    """

    @cache
    def graph() -> tuple[list[Tensor], ...]:
        own = with_grad(arguments, wanted, dtype)
        outputs = listed(function(**own))[: len(grads)]
        arriving = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
        return outputs, [own[name] for name in wanted], arriving

    return lambda: torch.autograd.grad(*graph(), retain_graph=True)


def exact(function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """A reference's results in fp64."""
    with torch.no_grad():
        return listed(function(**with_grad(arguments, (), torch.float64)))


def listed(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One result or several, as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def torchvision_rows(
    meter: Meter,
    name: str,
    arguments: Arguments,
    wanted: Sequence[str] = (),
    grad: Tensor | None = None,
    like: Callable[..., Any] = lambda function: function,
) -> None:
    """torchvision's operator in its dtypes: its forward pass, or with a gradient its backward pass.

    Args:
        meter: takes the rows.
        name: of the rows.
        arguments: of our function.
        wanted: which gradients.
        grad: of the output.
        like: makes our function of torchvision's.
    """
    try:
        theirs = like(load_torchvision(meter.device))
    except Unavailable as missing:
        print(f"{name}: {missing}")
        return
    for label, dtype in ({"fp32": FP32} if meter.dry else {"fp16": FP16, "fp32": FP32}).items():
        step = partial(theirs, **with_grad(arguments, (), dtype))
        if grad is not None:
            step = backward(theirs, arguments, wanted, [grad], dtype)
        meter.row(name, f"torchvision {label}", step)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` with an fp32 result."""
    multiply = torch.bmm if left.dim() == 3 else torch.mm
    if left.dtype == FP32 or left.device.type == "cpu":  # where PyTorch has no such product
        return multiply(left.float(), right.float())
    return multiply(left, right, out_dtype=FP32)


def multiply_fp32(left: Tensor, right: Tensor, tf32: bool) -> Tensor:
    """A product, or products, of fp32 in TF32 or exactly."""
    flags, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    flags.allow_tf32 = tf32
    try:
        return left @ right
    finally:
        flags.allow_tf32 = before


def model_offsets(x: Tensor) -> Tensor:
    """Offsets of DeGMix's layer at its initialisation."""
    torch.manual_seed(0)
    with torch.no_grad(), x.device:
        return Offsets(x.shape[1])(x).contiguous()
