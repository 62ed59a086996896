"""Launches of the forward kernels of the gate and the gated MLP. Plans touch no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from degmix_kernels.gating import kernels
from degmix_kernels.launch import Launch, needs_64_bit
from degmix_kernels.maps import ceil_div, largest_unit, power_of_two
from degmix_kernels.product import precision

_WIDEST, _STEP = 4096, 1024  # columns that one tile holds, and of wider rows at a time
_ELEMENTS_PER_WARP = 512  # 16 per thread
_MULTIPROCESSORS = 132  # below this many programs, smaller ones are better


@dataclass(frozen=True)
class RowTiles:
    """Tiles of the passes that go along rows.

    Attributes:
        rows: of a tile.
        columns: of a tile.
        whole: whether a tile holds whole rows.
    """

    rows: int
    columns: int
    whole: bool

    @classmethod
    def of(cls, rows: int, columns: int, tile: int = 2048) -> RowTiles:
        """Tiles of about ``tile`` elements of a (rows, columns) matrix."""
        width = power_of_two(columns)
        if width > _WIDEST:
            return cls(1, _STEP, False)
        return cls(min(max(tile // width, 1), power_of_two(rows)), width, True)

    @property
    def warps(self) -> int:
        """Warps for such a tile."""
        return min(max(self.rows * self.columns // _ELEMENTS_PER_WARP, 1), 8) if self.whole else 4

    @property
    def backward_warps(self) -> int:
        """Twice as many for the backward pass, which keeps three sums of every element beside it."""
        return 2 * self.warps


@dataclass(frozen=True)
class Tiles:
    """Tiles of a matrix product.

    Attributes:
        rows: of a tile of the result.
        columns: of a tile of the result.
        inner: of the step along the sum.
        warps: of a program.
        stages: of the software pipeline.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    @classmethod
    def of(
        cls,
        rows: int,
        columns: int,
        inner: int,
        dtype: torch.dtype,
        heavy: bool = False,
        widest: int = 128,
    ) -> Tiles:
        """Tiles for a product of this size, of at most ``widest`` columns.

        ``heavy`` says that much is done with each tile of the result.
        """
        if dtype == torch.float32:
            return cls(
                min(power_of_two(rows, 16), 64),
                min(power_of_two(columns, 16), 64),
                min(power_of_two(inner, 16), 32),
                8 if heavy else 4,
                2,
            )
        # Rows that are read element by element need an address and a mask for each.
        aligned = columns % 16 == 0 and inner % 4 == 0
        # At least 64 × 32: the smallest products of Hopper's and Blackwell's own instructions.
        wide, tall = min(power_of_two(columns, 32), widest if aligned else 32 if heavy else 64), 64
        if not heavy and ceil_div(rows, 128) * ceil_div(columns, wide) >= _MULTIPROCESSORS:
            tall = 128
        deep = min(power_of_two(inner, 16), 64 if aligned else 32)
        few = tall * wide <= (64 * 32 if heavy else 64 * 64)
        return cls(tall, wide, deep, 4 if few else 8, 2)

    def constants(self, dtype: torch.dtype, *tensors: Tensor | None) -> dict[str, Any]:
        """Compile-time arguments; ``tensors`` are those whose addresses may be large."""
        return {
            "PRECISION": precision(dtype),
            "INDEX_64": needs_64_bit(*tensors),
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_INNER": self.inner,
        }

    @property
    def resources(self) -> dict[str, int]:
        """Warps and stages, as ``Launch`` takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def row_stride(rows: Tensor) -> int:
    """Distance of the rows of a (B, N, C) tensor that ``as_rows`` made."""
    return rows.stride(1) if rows.shape[1] > 1 else rows.stride(0) if rows.shape[0] > 1 else rows.shape[2]


def as_rows(tensor: Tensor) -> Tensor:
    """A (B, N, C) tensor whose rows are contiguous and equally far apart, itself if it is one."""
    batch, tokens, channels = tensor.shape
    stride = row_stride(tensor)
    even = batch <= 1 or tokens <= 1 or tensor.stride(0) == tokens * stride
    dense = channels <= 1 or tensor.stride(2) == 1
    return tensor if even and dense else tensor.contiguous()


def plan_normalise(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str,
    statistics: Tensor | None,
    output: Tensor | None,
) -> Launch:
    """LayerNorm of act(x) into ``output``, and its row statistics, (2, rows), each if given."""
    rows, columns = x.shape[0] * x.shape[1], x.shape[2]
    tiles = RowTiles.of(rows, columns)
    return Launch(
        kernels.normalise,
        ceil_div(rows, tiles.rows),
        {
            "x_ptr": x,
            "norm_weight_ptr": norm_weight,
            "norm_bias_ptr": norm_bias,
            "statistics_ptr": statistics,
            "output_ptr": output,
            "eps": eps,
            "stride": row_stride(x),
            "rows": rows,
            "columns": columns,
        },
        {
            "ACTIVATION": activation,
            "WHOLE": tiles.whole,
            "INDEX_64": needs_64_bit(x, output),
            "BLOCK_ROWS": tiles.rows,
            "BLOCK_COLUMNS": tiles.columns,
        },
        num_warps=tiles.warps,
    )


def wants_statistics(x: Tensor, columns: int) -> bool:
    """Whether the rows' statistics are better computed once, by ``plan_normalise``, than by every program.

    Every program of ``linear`` that computes them reads its rows three times instead of once; so one more
    pass over x is less than that as soon as more than two programs share the rows.
    """
    tiles = Tiles.of(x.shape[0] * x.shape[1], columns, x.shape[2], x.dtype)
    return ceil_div(columns, tiles.columns) > 2


def plan_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: tuple[Tensor, Tensor, float] | None = None,
    statistics: Tensor | None = None,
    activation: str = "identity",
    multiplier: Tensor | None = None,
    residual: Tensor | None = None,
    pre: Tensor | None = None,
    output: Tensor | None = None,
) -> Launch:
    """``act(LayerNorm(x) · weightᵀ + bias) ⊙ multiplier + residual``.

    Args:
        x: (B, N, inner), made by ``as_rows``.
        weight: (columns, inner), contiguous like all that follows.
        bias: (columns,).
        norm: weight, bias and eps of the LayerNorm; none if None.
        statistics: of the rows of x, by ``plan_normalise``; computed again if None.
        activation: one of ``epilogue.ACTIVATIONS``.
        multiplier: (B, N, columns), made by ``as_rows``.
        residual: (B, N, columns).
        pre: filled with the value before the activation, if given.
        output: filled with the result, if given. Without one the result takes the place of ``multiplier``.
    """
    rows, (columns, inner) = x.shape[0] * x.shape[1], weight.shape
    tiles = Tiles.of(rows, columns, inner, x.dtype)
    column_blocks = ceil_div(columns, tiles.columns)
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else norm
    return Launch(
        kernels.linear,
        ceil_div(rows, tiles.rows) * column_blocks,
        {
            "x_ptr": x,
            "norm_weight_ptr": norm_weight,
            "norm_bias_ptr": norm_bias,
            "statistics_ptr": statistics,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "multiplier_ptr": multiplier,
            "residual_ptr": residual,
            "pre_ptr": pre,
            "output_ptr": output,
            "eps": eps,
            "x_stride": row_stride(x),
            "multiplier_stride": 0 if multiplier is None else row_stride(multiplier),
            "rows": rows,
            "columns": columns,
            "inner": inner,
            "column_blocks": column_blocks,
        },
        {
            "ACTIVATION": activation,
            **tiles.constants(x.dtype, x, weight, multiplier, residual, pre, output),
        },
        **tiles.resources,
    )


def plan_mix_tokens(
    weight: Tensor, normed: Tensor, bias: Tensor, multiplier: Tensor, output: Tensor | None
) -> Launch:
    """``(weight · normed + bias) ⊙ multiplier`` for every element of the batch.

    Without ``output`` the result takes the place of ``multiplier``.
    """
    batch, tokens, columns = normed.shape
    tiles = Tiles.of(tokens, columns, tokens, normed.dtype)
    row_blocks, column_blocks = ceil_div(tokens, tiles.rows), ceil_div(columns, tiles.columns)
    return Launch(
        kernels.mix_tokens,
        batch * row_blocks * column_blocks,
        {
            "weight_ptr": weight,
            "normed_ptr": normed,
            "bias_ptr": bias,
            "multiplier_ptr": multiplier,
            "output_ptr": output,
            "multiplier_stride": row_stride(multiplier),
            "tokens": tokens // largest_unit(tokens),
            "columns": columns,
            "row_blocks": row_blocks,
            "column_blocks": column_blocks,
        },
        {
            "TOKENS_UNIT": largest_unit(tokens),
            **tiles.constants(normed.dtype, weight, normed, multiplier, output),
        },
        **tiles.resources,
    )
