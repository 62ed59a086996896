"""``coordinate_bias`` beyond what every op is tested for: borders, layouts, bad input, the module."""

from __future__ import annotations

import pytest
import torch
from contract import compare, draw
from torch import Tensor

from degmix_kernels import CoordinateBias, coordinate_bias
from degmix_kernels.coordinate_bias import reference


def tables(groups: int, of_rows: int, of_columns: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    rows = draw(groups, of_rows, height, min(width, 3), seed=1).float()
    return rows, draw(groups, of_columns, min(height, 3), width, seed=2).float()


def pixel_by_pixel(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """The map that the tables stand for, (1, C, height, width), by its definition in words."""

    def which(position: int, size: int) -> int:
        return 0 if position == 0 else min(size, 3) - 1 if position == size - 1 else 1

    every = [
        torch.cat([rows[:, :, y, which(x, width)], columns[:, :, which(y, height), x]], dim=1).flatten()
        for y in range(height)
        for x in range(width)
    ]
    return torch.stack(every, dim=1).view(1, -1, height, width)


@pytest.mark.parametrize("height", [1, 2, 3, 4, 33])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_first_middle_and_last_rows_and_columns(device, height, width, last):
    x, (rows, columns) = draw(2, 10, height, width).float(), tables(2, 3, 2, height, width)
    want = x + pixel_by_pixel(rows, columns, height, width)
    assert torch.equal(reference.coordinate_bias(x, rows, columns), want)
    layout = torch.channels_last if last else torch.contiguous_format
    x = x.to(device, memory_format=layout)
    got = coordinate_bias(x, rows.to(device), columns.to(device))
    assert torch.equal(got.cpu(), want)
    assert got.is_contiguous(memory_format=layout)


def test_tables_keep_their_precision(device):
    """A coordinate of 1000.25 has no place in bf16; added to its negative the rest is exact."""
    rows, columns = torch.full((1, 1, 4, 3), 1000.25), torch.full((1, 1, 3, 5), 1000.25)
    x = torch.full((1, 2, 4, 5), -1000.0, dtype=torch.bfloat16)
    got = coordinate_bias(x.to(device), rows.to(device), columns.to(device))
    assert got.dtype == torch.bfloat16
    assert (got == 0.25).all()


def test_gradients_of_non_contiguous_tables(device):
    rows, columns = (torch.stack([each, each], 1)[:, 0].to(device) for each in tables(4, 3, 2, 6, 7))
    assert not rows.is_contiguous()
    grad = draw(3, 20, 6, 7, seed=3).to(device).contiguous(memory_format=torch.channels_last)
    named = {"x": draw(3, 20, 6, 7).float().to(device), "rows": rows, "columns": columns}
    compare(coordinate_bias, reference.coordinate_bias, named, 3 * 7, grad)


def test_module_starts_at_zero(device):
    module, x = CoordinateBias(3, 2, 6, 7).to(device), draw(2, 5, 6, 7).float().to(device)
    assert torch.equal(module(x), x)
    module(x).sum().backward()
    assert torch.equal(module.rows.grad.cpu()[0, 0], torch.tensor([2.0, 10.0, 2.0]).expand(6, 3))


@pytest.mark.parametrize("sizes", [(0, 0, 6, 7), (-1, 2, 6, 7), (1, 2, 0, 7)])
def test_module_without_channels_or_pixels_is_refused(sizes):
    with pytest.raises(ValueError, match="expected"):
        CoordinateBias(*sizes)
