"""What the registry knows of batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import backend
from degmix_kernels.batch_norm import reference
from degmix_kernels.batch_norm.module import BatchNorm2d
from degmix_kernels.batch_norm.op import batch_norm
from degmix_kernels.contract import Cost, Op, Sample
from degmix_kernels.launch import Launch

# shape of x, weight and bias, residual
_CALLS = (
    ((2, 5, 6, 9), True, True),
    ((1, 17, 5, 3), True, False),
    ((3, 16, 4, 8), False, True),
    ((11, 7), True, True),
    ((9, 40, 1, 1), False, False),
    ((1, 1, 1, 1), True, True),
    ((0, 4, 3, 5), True, True),
)


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    samples = []
    for shape, affine, residual in _CALLS:
        channels = shape[1]
        arguments = {
            "x": draw(*shape),
            "mean": draw(channels),
            "variance": draw(channels).square() + 0.5,
            "weight": draw(channels) if affine else None,
            "bias": draw(channels) if affine else None,
            "residual": draw(*shape) if residual else None,
            "eps": 1e-3,
        }
        # The gradient of a variance has 1 / √(variance + eps) to the third power, which one channel shares.
        roots = {"variance": 3} if channels == 1 else {}
        samples.append(Sample(arguments, max(arguments["x"].numel() // channels, 1), roots))
    return samples


def _plan(dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch, on meta tensors; none where Triton is not installed."""
    if not backend.HAS_TRITON:
        return []
    from degmix_kernels.batch_norm.plan import plan_examples

    return plan_examples(dtype)


# Memory only: there is no product.
_COST = Cost(
    output=lambda arguments: tuple(arguments["x"].shape),
    products=lambda arguments: 0,
    backward_products=0,
    backward_reads=("x", "mean", "variance", "weight"),
    passed_on=("residual",),
)


OPS = (
    Op(
        name="batch_norm",
        function=batch_norm,
        reference=reference.batch_norm,
        module=BatchNorm2d,
        samples=_samples,
        differentiable=("x", "mean", "variance", "weight", "bias", "residual"),
        cost=_COST,
        batched=("x", "residual"),
        keeps_layout_of="x",
        autocast=("x", "residual"),
        kernels=_plan,
    ),
)
