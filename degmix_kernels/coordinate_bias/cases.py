"""Calls of ``coordinate_bias``: what the contract tests run, what the compile check compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from degmix_kernels.contract import Op, Sample, Shape
from degmix_kernels.coordinate_bias import reference
from degmix_kernels.coordinate_bias.module import CoordinateBias
from degmix_kernels.coordinate_bias.op import coordinate_bias, op

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


def _shapes(dtype: torch.dtype) -> Iterator[Shape]:
    """DeGMix's offsets on NYUD-v2, in both layouts; ragged sizes, more than 2³¹ elements."""
    # shape of x, groups, channels last
    calls = [((8, 512, 107, 140), 1, False), ((8, 512, 107, 140), 1, True)]
    if dtype == torch.float32:
        calls += [
            ((1, 2048, 107, 140), 4, False),
            ((2, 50, 7, 7), 5, False),
            ((3, 512, 2048, 1024), 1, False),
        ]
    for shape, groups, last in calls:
        half, (height, width) = shape[1] // (2 * groups), shape[2:]
        layout = torch.channels_last if last else torch.contiguous_format
        yield Shape(
            {
                "x": torch.empty(shape, dtype=dtype, memory_format=layout),
                "rows": torch.empty(groups, half, height, 3),
                "columns": torch.empty(groups, half, 3, width),
            }
        )


OPS = (
    Op(
        op=op,
        function=coordinate_bias,
        reference=reference.coordinate_bias,
        module=CoordinateBias,
        samples=_samples,
        shapes=_shapes,
        batched=("x",),
        backward_reads=(),  # the tables' gradients are sums of the result's
        keeps_layout_of="x",
    ),
)
