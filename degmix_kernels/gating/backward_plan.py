"""Launches of the backward kernels of the gate and the gated MLP. Plans touch no memory."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels.gating import backward_kernels as kernels
from degmix_kernels.gating.plan import RowTiles, Tiles, row_stride
from degmix_kernels.launch import Launch, needs_64_bit
from degmix_kernels.maps import ceil_div, largest_unit, power_of_two

_PROGRAMS = 1024  # of passes along rows: about one wave of eight programs on each of 132 multiprocessors
_WEIGHT_PROGRAMS = 512  # of the token weight's gradient


def plan_gate_backward(
    normed: Tensor,
    weight: Tensor,
    bias: Tensor,
    u: Tensor,
    mode: str,
    activation: str,
    grad: Tensor | None,
    gated: Tensor | None,
    grad_mixed: Tensor | None,
    grad_u: Tensor | None,
    bias_sums: bool,
    u_sums: bool,
) -> tuple[Launch, Tensor | None, Tensor | None]:
    """Of ``act(u) ⊙ (weight · normed + bias)``: value and gradients.

    Args:
        normed: (B, N, C), contiguous like all but u and grad_u.
        weight: as in the forward pass.
        bias: as in the forward pass.
        u: before its activation, made by ``as_rows``.
        mode: ``"channel"`` or ``"token"``.
        activation: of u.
        grad: of the result; needed for all but ``gated``.
        gated: filled with the result, if given.
        grad_mixed: filled with the gradient of ``weight · normed + bias``, if given.
        grad_u: filled with the gradient of u, if given; made by ``as_rows``.
        bias_sums: whether to sum for the gradient of ``bias``.
        u_sums: whether to sum the gradient of u over all tokens.

    Returns:
        The launch, and both sums, fp32, in parts along the first axis.
    """
    batch, tokens, columns = normed.shape
    by_token = mode == "token"
    elements, rows = (batch, tokens) if by_token else (1, batch * tokens)
    inner = tokens if by_token else columns
    # 64-bit addresses take twice the registers.
    widest = 64 if needs_64_bit(normed, weight, u, grad_u) else 128
    tiles = Tiles.of(rows, columns, inner, normed.dtype, heavy=True, widest=widest)
    row_blocks, column_blocks = ceil_div(rows, tiles.rows), ceil_div(columns, tiles.columns)

    def sums(parts: int, size: int) -> Tensor:
        return normed.new_empty((parts, size), dtype=torch.float32)

    of_bias = of_u = None
    if bias_sums:
        of_bias = sums(batch * column_blocks, tokens) if by_token else sums(row_blocks, columns)
    if u_sums:
        of_u = sums(elements * row_blocks, columns)
    launch = Launch(
        kernels.gate_backward,
        elements * row_blocks * column_blocks,
        {
            "normed_ptr": normed,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "u_ptr": u,
            "grad_ptr": grad,
            "gated_ptr": gated,
            "grad_mixed_ptr": grad_mixed,
            "grad_u_ptr": grad_u,
            "bias_sums_ptr": of_bias,
            "u_sums_ptr": of_u,
            "u_stride": row_stride(u),
            "grad_u_stride": 0 if grad_u is None else row_stride(grad_u),
            "tokens": rows,
            "columns": columns,
            "inner": inner // largest_unit(inner),
            "row_blocks": row_blocks,
            "column_blocks": column_blocks,
        },
        {
            "ACTIVATION": activation,
            "TOKENS": by_token,
            "INNER_UNIT": largest_unit(inner),
            **tiles.constants(normed.dtype, normed, weight, u, grad_u),
        },
        **tiles.resources,
    )
    return launch, of_bias, of_u


def plan_norm_backward(
    grad: Tensor,
    x: Tensor,
    norm: tuple[Tensor, Tensor, float],
    activation: str,
    residual: Tensor | None,
    grad_x: Tensor | None,
    normed: Tensor | None,
    sums: bool,
) -> tuple[list[Launch], Tensor | None]:
    """The way back through ``LayerNorm(act(x))``.

    Args:
        grad: of the LayerNorm's result, (B, N, C), contiguous.
        x: before its activation, made by ``as_rows``.
        norm: weight, bias and eps of the LayerNorm.
        activation: of x.
        residual: gradient of x from elsewhere, contiguous, or None.
        grad_x: filled with the gradient of x, if given; made by ``as_rows``.
        normed: filled with the LayerNorm's result, if given; contiguous.
        sums: whether to sum.

    Returns:
        The launches, and the sums over all rows of grad · x̂, of grad, and of the residual or else of the
        gradient of x, as (3, parts, C), fp32.
    """
    rows, columns = x.shape[0] * x.shape[1], x.shape[2]
    tiles = RowTiles.of(rows, columns)
    column_blocks = ceil_div(columns, tiles.columns)
    row_blocks = ceil_div(rows, tiles.rows)
    parts = min(row_blocks, max(_PROGRAMS // column_blocks, 1))
    steps = ceil_div(row_blocks, max(parts, 1))
    parts = ceil_div(row_blocks, max(steps, 1))
    partial = grad.new_empty((3, parts, columns), dtype=torch.float32) if sums else None
    norm_weight, norm_bias, eps = norm
    shared = {
        "grad_ptr": grad,
        "x_ptr": x,
        "norm_weight_ptr": norm_weight,
        "eps": eps,
        "rows": rows,
        "columns": columns,
    }
    constants = {
        "ACTIVATION": activation,
        "INDEX_64": needs_64_bit(x, grad_x),
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_COLUMNS": tiles.columns,
    }
    launches, row_sums = [], None
    if not tiles.whole:
        row_sums = grad.new_empty((4, rows), dtype=torch.float32)
        launches.append(
            Launch(
                kernels.norm_sums,
                row_blocks,
                {**shared, "sums_ptr": row_sums, "stride": row_stride(x)},
                constants,
                num_warps=tiles.warps,
            )
        )
    launches.append(
        Launch(
            kernels.norm_backward,
            parts * column_blocks,
            {
                **shared,
                "residual_ptr": residual,
                "norm_bias_ptr": norm_bias,
                "rows_ptr": row_sums,
                "grad_x_ptr": grad_x,
                "normed_ptr": normed,
                "sums_ptr": partial,
                "x_stride": row_stride(x),
                "grad_x_stride": 0 if grad_x is None else row_stride(grad_x),
                "column_blocks": column_blocks,
                "steps": steps,
                "parts": parts,
            },
            constants,
            num_warps=tiles.backward_warps,
        )
    )
    return launches, partial


def plan_token_weight(grad: Tensor, normed: Tensor) -> tuple[Launch, Tensor]:
    """The gradient of the token mode's weight, ``Σ grad · normedᵀ``, fp32, in parts along the first axis."""
    batch, tokens, columns = grad.shape
    # A power of two passes as aligned, which is right: the kernel reads no row of `tokens` elements.
    tiles = Tiles.of(tokens, power_of_two(tokens, 16), columns, grad.dtype, heavy=True, widest=64)
    row_blocks, column_blocks = ceil_div(tokens, tiles.rows), ceil_div(tokens, tiles.columns)
    parts = min(batch, ceil_div(_WEIGHT_PROGRAMS, max(row_blocks * column_blocks, 1)))
    steps = ceil_div(batch, max(parts, 1))
    parts = ceil_div(batch, max(steps, 1))
    sums = grad.new_empty((parts, tokens, tokens), dtype=torch.float32)
    launch = Launch(
        kernels.token_weight,
        parts * row_blocks * column_blocks,
        {
            "grad_ptr": grad,
            "normed_ptr": normed,
            "sums_ptr": sums,
            "batch": batch,
            "tokens": tokens,
            "columns": columns,
            "row_blocks": row_blocks,
            "column_blocks": column_blocks,
            "steps": steps,
        },
        tiles.constants(grad.dtype, grad, sums),
        **tiles.resources,
    )
    return launch, sums
