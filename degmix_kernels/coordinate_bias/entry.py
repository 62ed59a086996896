"""What the registry knows of ``coordinate_bias``."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import backend
from degmix_kernels.contract import Sample
from degmix_kernels.contract_old import Cost, Op
from degmix_kernels.coordinate_bias import reference
from degmix_kernels.coordinate_bias.module import CoordinateBias
from degmix_kernels.coordinate_bias.op import coordinate_bias
from degmix_kernels.launch import Launch

# batch, groups, channels by row, channels by column, height, width
_CALLS = (
    (2, 2, 3, 2, 6, 9),
    (1, 1, 4, 4, 3, 16),
    (3, 3, 0, 5, 1, 2),
    (2, 1, 5, 0, 2, 1),
    (1, 1, 1, 1, 1, 1),
    (0, 2, 1, 2, 4, 5),
)


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    return [
        Sample(
            {
                "x": draw(batch, groups * (of_rows + of_columns), height, width),
                "rows": draw(groups, of_rows, height, min(width, 3)),
                "columns": draw(groups, of_columns, min(height, 3), width),
            },
            max(batch, 1) * max(height, width),
        )
        for batch, groups, of_rows, of_columns, height, width in _CALLS
    ]


def _plan(dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch, on meta tensors; none where Triton is not installed."""
    if not backend.HAS_TRITON:
        return []
    from degmix_kernels.coordinate_bias.plan import plan_examples

    return plan_examples(dtype)


# Memory only: there is no product, and the tables' gradients are sums of the result's.
_COST = Cost(
    output=lambda arguments: tuple(arguments["x"].shape),
    products=lambda arguments: 0,
    backward_products=0,
    backward_reads=(),
    passed_on=("x",),
)


OPS = (
    Op(
        name="coordinate_bias",
        function=coordinate_bias,
        reference=reference.coordinate_bias,
        module=CoordinateBias,
        samples=_samples,
        differentiable=("x", "rows", "columns"),
        cost=_COST,
        batched=("x",),
        keeps_layout_of="x",
        autocast=("x",),
        kernels=_plan,
    ),
)
