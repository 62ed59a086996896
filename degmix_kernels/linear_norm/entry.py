"""What the registry knows of ``linear_norm``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from degmix_kernels import backend
from degmix_kernels.contract import Sample
from degmix_kernels.contract_old import Cost, Op
from degmix_kernels.launch import Launch
from degmix_kernels.linear_norm import reference
from degmix_kernels.linear_norm.module import LinearNorm
from degmix_kernels.linear_norm.op import linear_norm

# shape of x, blocks of parameters or none, out channels, bias, addend, residual
_CALLS = (
    ((2, 5, 6, 9), (), 7, True, True, True),
    ((2, 9, 10), (), 6, True, False, True),
    ((3, 1, 17), (), 33, False, True, False),
    ((4, 5, 7), (2,), 6, True, True, True),
    ((3, 4, 16), (3,), 16, False, False, True),
    ((1, 16, 1, 3), (), 16, True, False, False),
    ((0, 4, 3, 5), (), 2, True, True, True),
)


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    samples = []
    for shape, blocks, out, bias, addend, residual in _CALLS:
        is_map = len(shape) == 4
        result = (shape[0], out, *shape[2:]) if is_map else (*shape[:2], out)
        channels = shape[1] if is_map else shape[2]
        arguments = {
            "x": draw(*shape),
            "weight": draw(*blocks, out, channels) / channels**0.5,
            "bias": draw(*blocks, out) if bias else None,
            "norm_weight": draw(*blocks, out),
            "norm_bias": draw(*blocks, out),
            "addend": draw(*result) if addend else None,
            "residual": draw(*result) if residual else None,
        }
        pixels = arguments["x"].numel() // channels
        # In succession: of the product, of the LayerNorm, over pixels of the parameters' gradients.
        samples.append(Sample(arguments, channels + out + pixels))
    return samples


def _plan(dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch, on meta tensors; none where Triton is not installed."""
    if not backend.HAS_TRITON:
        return []
    from degmix_kernels.linear_norm.plan import plan_examples

    return plan_examples(dtype)


def _output(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    x, out = arguments["x"], arguments["weight"].shape[-2]
    return (x.shape[0], out, *x.shape[2:]) if x.dim() == 4 else (*x.shape[:2], out)


def _products(arguments: Mapping[str, Any]) -> int:
    """2 · pixels · Cout · C: W x at every pixel."""
    x, (*_, out, channels) = arguments["x"], arguments["weight"].shape
    return 2 * (x.numel() // channels) * out * channels


_COST = Cost(
    output=_output,
    products=_products,
    backward_products=2,
    backward_reads=("x", "weight", "bias", "norm_weight", "addend"),
    passed_on=("residual",),
)


OPS = (
    Op(
        name="linear_norm",
        function=linear_norm,
        reference=reference.linear_norm,
        module=LinearNorm,
        samples=_samples,
        differentiable=("x", "weight", "bias", "norm_weight", "norm_bias", "addend", "residual"),
        cost=_COST,
        batched=("x", "addend", "residual"),
        keeps_layout_of="x",
        autocast=("x", "weight", "bias", "addend", "residual"),
        kernels=_plan,
    ),
)
