"""Launches of ``coordinate_bias``'s kernel. Plans touch no memory."""

from __future__ import annotations

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
