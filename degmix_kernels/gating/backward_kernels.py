"""Triton kernels of the gate and of the gated MLP, backward: what lies between matrix products.

Sums for the gradients of vectors are fp32 partial sums, one row per program, in a fixed order.
"""

import triton
import triton.language as tl

from degmix_kernels.epilogue import activate_with_slope
from degmix_kernels.gating.kernels import (
    affine,
    load_pivot,
    load_shifted,
    product,
    row_statistics,
    tile_statistics,
)


@triton.jit
def gate_backward(
    normed_ptr,  # (rows, columns), contiguous
    weight_ptr,  # (columns, columns) or, for TOKENS, (tokens, tokens), contiguous
    bias_ptr,
    u_ptr,  # before its activation
    grad_ptr,  # of the gate's result, contiguous, or None
    gated_ptr,  # for the gate's result, contiguous, or None
    grad_mixed_ptr,  # for the gradient of weight · normed + bias, contiguous, or None
    grad_u_ptr,  # or None
    bias_sums_ptr,  # (parts, columns), for TOKENS (parts, tokens), fp32, or None
    u_sums_ptr,  # (parts, columns) fp32, or None
    u_stride,
    grad_u_stride,
    tokens,  # rows of one element of the batch for TOKENS, else all rows
    columns,
    inner,  # tokens or columns, in units
    row_blocks,
    column_blocks,
    ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr,
    INNER_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """The value of u ⊙ (weight · normed + bias) again, gradients of both factors, and their sums: a tile."""
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    inner_units = inner
    inner *= INNER_UNIT
    row_block, column_block = program // column_blocks, program % column_blocks
    element = row_block // row_blocks  # 0 unless TOKENS
    token = row_block % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    token_valid, column_valid = token < tokens, column < columns
    mixed = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if TOKENS:
        mixed = product(
            weight_ptr, normed_ptr + element * tokens * columns, mixed, token, token_valid, column,
            column_valid, inner, columns, 1, inner_units, INNER_UNIT, PRECISION, BLOCK_INNER,
        )  # fmt: skip
        mixed += tl.load(bias_ptr + token, mask=token_valid, other=0.0).to(tl.float32)[:, None]
    else:
        mixed = product(
            normed_ptr, weight_ptr, mixed, token, token_valid, column, column_valid, columns, 1, inner,
            inner_units, INNER_UNIT, PRECISION, BLOCK_INNER,
        )  # fmt: skip
        mixed += tl.load(bias_ptr + column, mask=column_valid, other=0.0).to(tl.float32)[None, :]

    valid = token_valid[:, None] & column_valid[None, :]
    row = (element * tokens + token)[:, None]
    address = row * columns + column[None, :]
    u = tl.load(u_ptr + row * u_stride + column[None, :], mask=valid, other=0.0).to(tl.float32)
    u, slope = activate_with_slope(u, ACTIVATION)
    if gated_ptr is not None:
        tl.store(gated_ptr + address, (u * mixed).to(gated_ptr.dtype.element_ty), mask=valid)
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + address, mask=valid, other=0.0).to(tl.float32)
        grad_mixed = grad * u
        if grad_mixed_ptr is not None:
            tl.store(grad_mixed_ptr + address, grad_mixed.to(grad_mixed_ptr.dtype.element_ty), mask=valid)
        if bias_sums_ptr is not None:
            grad_mixed = tl.where(valid, grad_mixed, 0.0)
            if TOKENS:
                part = element * column_blocks + column_block
                tl.store(bias_sums_ptr + part * tokens + token, tl.sum(grad_mixed, axis=1), mask=token_valid)
            else:
                at = row_block * columns + column
                tl.store(bias_sums_ptr + at, tl.sum(grad_mixed, axis=0), mask=column_valid)
        grad_u = grad * mixed
        if ACTIVATION != "identity":
            grad_u *= slope
        if grad_u_ptr is not None:
            at = row * grad_u_stride + column[None, :]
            tl.store(grad_u_ptr + at, grad_u.to(grad_u_ptr.dtype.element_ty), mask=valid)
        if u_sums_ptr is not None:
            total = tl.sum(tl.where(valid, grad_u, 0.0), axis=0)
            tl.store(u_sums_ptr + row_block * columns + column, total, mask=column_valid)


@triton.jit
def norm_sums(
    grad_ptr,  # of the LayerNorm's result, contiguous
    x_ptr,  # before its activation
    norm_weight_ptr,
    sums_ptr,  # (4, rows) fp32
    eps,
    stride,
    rows,
    columns,
    ACTIVATION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """What ``norm_backward`` needs to know of rows wider than its tile: the statistics of act(x), then h̄, h̄x̂.

    With h = grad · weight, the last two are the means over the row of h and of h · x̂.
    """
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = row < rows
    pivot = load_pivot(x_ptr, row, row_valid, stride, ACTIVATION)
    mean, scale = row_statistics(
        x_ptr, pivot, row, row_valid, stride, columns, eps, ACTIVATION, BLOCK_COLUMNS
    )
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    total_product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        valid = row_valid[:, None] & (column < columns)
        x = (load_shifted(x_ptr, row[:, None] * stride + column, valid, pivot, ACTIVATION) - mean) * scale
        grad = tl.load(grad_ptr + row[:, None] * columns + column, mask=valid, other=0.0).to(tl.float32)
        grad *= tl.load(norm_weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
        total += grad
        total_product += grad * x
    sums_ptr += row[:, None]
    valid = row_valid[:, None]
    tl.store(sums_ptr, mean, mask=valid)
    tl.store(sums_ptr + rows, scale, mask=valid)
    tl.store(sums_ptr + 2 * rows, tl.sum(total, axis=1, keep_dims=True) / columns, mask=valid)
    tl.store(sums_ptr + 3 * rows, tl.sum(total_product, axis=1, keep_dims=True) / columns, mask=valid)


@triton.jit
def norm_backward(
    grad_ptr,  # of the LayerNorm's result, contiguous
    x_ptr,  # before its activation
    residual_ptr,  # gradient that goes past the LayerNorm, contiguous, or None
    norm_weight_ptr,
    norm_bias_ptr,
    rows_ptr,  # of ``norm_sums``, or None: a tile holds whole rows
    grad_x_ptr,  # or None
    normed_ptr,  # for the LayerNorm's result, contiguous, or None
    sums_ptr,  # (3, parts, columns) fp32, or None
    eps,
    x_stride,
    grad_x_stride,
    rows,
    columns,
    column_blocks,
    steps,  # tiles of a program
    parts,
    ACTIVATION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The gradient of x through LayerNorm(act(x)), and the result again, over one part of the rows.

    Three sums per column: of grad · x̂, of grad, and of the residual or, without one, of the gradient of x.
    """
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    part, column_block = program // column_blocks, program % column_blocks
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    column_valid = column < columns
    norm_weight = tl.load(norm_weight_ptr + column, mask=column_valid, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    bias_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    other_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(steps):
        row = (part * steps + step) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_valid = row < rows  # the last part may end past the last row
        valid = row_valid[:, None] & column_valid
        x = tl.load(x_ptr + row[:, None] * x_stride + column, mask=valid, other=0.0).to(tl.float32)
        x, slope = activate_with_slope(x, ACTIVATION)
        pivot = load_pivot(x_ptr, row, row_valid, x_stride, ACTIVATION)
        x = tl.where(valid, x - pivot, 0.0)
        address = row[:, None] * columns + column
        grad = tl.load(grad_ptr + address, mask=valid, other=0.0).to(tl.float32)
        result = grad * norm_weight
        if rows_ptr is None:
            mean, scale = tile_statistics(x, valid, columns, eps)
            x = tl.where(valid, (x - mean) * scale, 0.0)
            mean_grad = tl.sum(result, axis=1, keep_dims=True) / columns
            mean_product = tl.sum(result * x, axis=1, keep_dims=True) / columns
        else:
            at = rows_ptr + row[:, None]
            mean = tl.load(at, mask=row_valid[:, None], other=0.0)
            scale = tl.load(at + rows, mask=row_valid[:, None], other=0.0)
            mean_grad = tl.load(at + 2 * rows, mask=row_valid[:, None], other=0.0)
            mean_product = tl.load(at + 3 * rows, mask=row_valid[:, None], other=0.0)
            x = tl.where(valid, (x - mean) * scale, 0.0)
        if normed_ptr is not None:
            normed = affine(x, norm_weight_ptr, norm_bias_ptr, column, column_valid)
            tl.store(normed_ptr + address, normed.to(normed_ptr.dtype.element_ty), mask=valid)
        result = (result - mean_grad - x * mean_product) * scale
        if ACTIVATION != "identity":
            result *= slope
        other = result
        if residual_ptr is not None:
            other = tl.load(residual_ptr + address, mask=valid, other=0.0).to(tl.float32)
            result += other
        if grad_x_ptr is not None:
            at = row[:, None] * grad_x_stride + column
            tl.store(grad_x_ptr + at, result.to(grad_x_ptr.dtype.element_ty), mask=valid)
        if sums_ptr is not None:
            weight_sum += grad * x
            bias_sum += grad
            other_sum += tl.where(valid, other, 0.0)
    if sums_ptr is not None:
        sums_ptr += part * columns + column
        tl.store(sums_ptr, tl.sum(weight_sum, axis=0, keep_dims=True), mask=column_valid)
        sums_ptr += parts * columns
        tl.store(sums_ptr, tl.sum(bias_sum, axis=0, keep_dims=True), mask=column_valid)
        sums_ptr += parts * columns
        tl.store(sums_ptr, tl.sum(other_sum, axis=0, keep_dims=True), mask=column_valid)


@triton.jit
def token_weight(
    grad_ptr,  # of weight · normed + bias, (batch · tokens, columns), contiguous
    normed_ptr,  # (batch · tokens, columns), contiguous
    sums_ptr,  # (parts, tokens, tokens) fp32
    batch,
    tokens,
    columns,
    row_blocks,
    column_blocks,
    steps,  # elements of the batch of a program
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """A tile of grad · normedᵀ, summed over a part of the batch."""
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    part = program // column_blocks // row_blocks
    row = program // column_blocks % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = program % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(steps):
        element = part * steps + step
        end = tl.where(element < batch, tokens, 0)  # the last part may end past the batch
        start = tl.minimum(element, batch - 1) * tokens * columns
        total = product(
            grad_ptr + start, normed_ptr + start, total, row, row < end, column, column < tokens, columns,
            1, columns, columns, 1, PRECISION, BLOCK_INNER,
        )  # fmt: skip
    at = (part * tokens + row)[:, None] * tokens + column[None, :]
    tl.store(sums_ptr + at, total, mask=(row < tokens)[:, None] & (column < tokens)[None, :])
