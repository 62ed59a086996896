"""Launches of ``coordinate_bias``'s kernel. Plans touch no memory."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels.coordinate_bias import kernels
from degmix_kernels.launch import Launch
from degmix_kernels.maps import Sizes, warps

_TILE = 4096  # elements


def plan_forward(x: Tensor, rows: Tensor, columns: Tensor, output: Tensor) -> Launch:
    """The sum of a dense map and contiguous tables."""
    sizes = Sizes.of(x)
    blocks = sizes.blocks(_TILE)
    arguments = sizes.arguments(blocks)
    return Launch(
        kernels.forward,
        sizes.images * arguments["channel_blocks"] * arguments["pixel_blocks"],
        {
            "x_ptr": x,
            "rows_ptr": rows,
            "columns_ptr": columns,
            "output_ptr": output,
            **arguments,
            "height": x.shape[2],
            "width": x.shape[3],
            "row_channels": rows.shape[1],
            "column_channels": columns.shape[1],
        },
        sizes.constants(blocks, x),
        num_warps=warps(blocks),
    )


def plan_examples(dtype: torch.dtype) -> list[Launch]:
    """DeGMix's offsets on NYUD-v2, in both layouts, ragged sizes, more than 2³¹ elements."""
    calls = [((8, 512, 107, 140), 1, False), ((8, 512, 107, 140), 1, True)]
    if dtype == torch.float32:
        calls += [
            ((1, 2048, 107, 140), 4, False),
            ((2, 50, 7, 7), 5, False),
            ((3, 512, 2048, 1024), 1, False),
        ]
    launches = []
    for shape, groups, last in calls:
        x = torch.empty(shape, dtype=dtype, device="meta")
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        half, (height, width) = shape[1] // (2 * groups), shape[2:]
        rows = torch.empty(groups, half, height, 3, device="meta")
        columns = torch.empty(groups, half, 3, width, device="meta")
        launches.append(plan_forward(x, rows, columns, x))
    return launches
