"""The module around ``coordinate_bias``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from degmix_kernels import checks
from degmix_kernels.coordinate_bias.op import coordinate_bias


class CoordinateBias(nn.Module):
    """A learned bias by row for the first channels of a map and by column for the others, zero at first.

    Args:
        row_channels: channels with a bias by row.
        column_channels: channels with a bias by column.
        height: of the maps.
        width: of the maps.

    Raises:
        TypeError: for what is no integer.
        ValueError: for a size or a total of channels below 1.
    """

    def __init__(self, row_channels: int, column_channels: int, height: int, width: int) -> None:
        super().__init__()
        for name, count in {"height": height, "width": width}.items():
            checks.expect_integer(name, count, 1)
        for name, count in {"row_channels": row_channels, "column_channels": column_channels}.items():
            checks.expect_integer(name, count, 0)
        counts = row_channels, column_channels
        checks.expect(sum(counts) > 0, "column_channels", "more than 0 without row_channels", counts)
        self.rows = nn.Parameter(torch.zeros(1, row_channels, height, min(width, 3)))
        self.columns = nn.Parameter(torch.zeros(1, column_channels, min(height, 3), width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return coordinate_bias(x, self.rows, self.columns)
