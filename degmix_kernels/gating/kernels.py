"""Triton kernels of the gate and of the gated MLP, forward: LayerNorm of rows, and products with all around.

Tokens are the rows of a matrix, ``stride`` elements apart; u and v are halves of the rows of one matrix.
A row is normalised relative to its pivot, its first element: differences of neighbours in a row are exact
however far their mean is from 0, sums of them as good as they are small. Arithmetic and sums are fp32,
operands of matrix products are rounded to the tensors' dtype.
"""

import triton
import triton.language as tl

from degmix_kernels.epilogue import activate
from degmix_kernels.product import multiply


@triton.jit
def load_shifted(x_ptr, address, valid, pivot, ACTIVATION: tl.constexpr):
    """act(x) less the pivot of its row, fp32, of a tile; 0 outside."""
    x = activate(tl.load(x_ptr + address, mask=valid, other=0.0).to(tl.float32), ACTIVATION)
    return tl.where(valid, x - pivot, 0.0)


@triton.jit
def load_pivot(x_ptr, row, row_valid, stride, ACTIVATION: tl.constexpr):
    """act(x) of the first column, fp32, as (rows, 1)."""
    x = tl.load(x_ptr + row * stride, mask=row_valid, other=0.0).to(tl.float32)
    return activate(x, ACTIVATION)[:, None]


@triton.jit
def tile_statistics(shifted, valid, columns, eps):
    """Mean, relative to the pivot, and 1 / √(variance + eps) of whole rows, as (rows, 1)."""
    mean = tl.sum(shifted, axis=1, keep_dims=True) / columns
    centred = tl.where(valid, shifted - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / columns + eps)


@triton.jit
def row_statistics(
    x_ptr,
    pivot,
    row,
    row_valid,
    stride,
    columns,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As ``tile_statistics``, of rows of any width, read twice."""
    total = tl.zeros((row.shape[0], BLOCK), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        valid = row_valid[:, None] & (column < columns)
        total += load_shifted(x_ptr, row[:, None] * stride + column, valid, pivot, ACTIVATION)
    mean = tl.sum(total, axis=1, keep_dims=True) / columns
    total = tl.zeros((row.shape[0], BLOCK), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        valid = row_valid[:, None] & (column < columns)
        shifted = load_shifted(x_ptr, row[:, None] * stride + column, valid, pivot, ACTIVATION)
        centred = tl.where(valid, shifted - mean, 0.0)
        total += centred * centred
    return mean, tl.rsqrt(tl.sum(total, axis=1, keep_dims=True) / columns + eps)


@triton.jit
def affine(normal, weight_ptr, bias_ptr, column, column_valid):
    """normal · weight + bias, fp32, of a tile of columns (1, columns)."""
    weight = tl.load(weight_ptr + column, mask=column_valid, other=0.0).to(tl.float32)
    return normal * weight + tl.load(bias_ptr + column, mask=column_valid, other=0.0).to(tl.float32)


@triton.jit
def product(
    left_ptr,
    right_ptr,
    accumulator,
    row,  # of the left matrix
    row_valid,
    column,  # of the right one
    column_valid,
    left_stride,  # between rows
    right_stride_inner,
    right_stride_column,
    inner_units,  # a kernel argument, for a loop to end at
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """accumulator + left · right, fp32; the left matrix has contiguous rows."""
    inner = inner_units * UNIT
    for start in range(0, inner_units, BLOCK_INNER // UNIT):
        k = start * UNIT + tl.arange(0, BLOCK_INNER)
        left = tl.load(
            left_ptr + row[:, None] * left_stride + k[None, :],
            mask=row_valid[:, None] & (k < inner)[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + k[:, None] * right_stride_inner + column[None, :] * right_stride_column,
            mask=(k < inner)[:, None] & column_valid[None, :],
            other=0.0,
        )
        accumulator = multiply(left, right, accumulator, PRECISION)
    return accumulator


@triton.jit
def normalise(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    statistics_ptr,  # (2, rows) fp32: mean relative to the pivot, 1 / deviation; or None
    output_ptr,  # contiguous, or None
    eps,
    stride,
    rows,
    columns,
    ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """LayerNorm(act(x)) of a block of rows, its statistics, or both. WHOLE: one tile holds whole rows."""
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = row < rows
    pivot = load_pivot(x_ptr, row, row_valid, stride, ACTIVATION)
    if WHOLE:
        column = tl.arange(0, BLOCK_COLUMNS)[None, :]
        valid = row_valid[:, None] & (column < columns)
        shifted = load_shifted(x_ptr, row[:, None] * stride + column, valid, pivot, ACTIVATION)
        mean, scale = tile_statistics(shifted, valid, columns, eps)
        if output_ptr is not None:
            result = affine(
                (shifted - mean) * scale, norm_weight_ptr, norm_bias_ptr, column, column < columns
            )
            address = row[:, None] * columns + column
            tl.store(output_ptr + address, result.to(output_ptr.dtype.element_ty), mask=valid)
    else:
        mean, scale = row_statistics(
            x_ptr, pivot, row, row_valid, stride, columns, eps, ACTIVATION, BLOCK_COLUMNS
        )
        if output_ptr is not None:
            for start in range(0, columns, BLOCK_COLUMNS):
                column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
                valid = row_valid[:, None] & (column < columns)
                shifted = load_shifted(x_ptr, row[:, None] * stride + column, valid, pivot, ACTIVATION)
                result = affine(
                    (shifted - mean) * scale, norm_weight_ptr, norm_bias_ptr, column, column < columns
                )
                address = row[:, None] * columns + column
                tl.store(output_ptr + address, result.to(output_ptr.dtype.element_ty), mask=valid)
    if statistics_ptr is not None:
        tl.store(statistics_ptr + row[:, None], mean, mask=row_valid[:, None])
        tl.store(statistics_ptr + rows + row[:, None], scale, mask=row_valid[:, None])


@triton.jit
def linear(
    x_ptr,
    norm_weight_ptr,  # of a LayerNorm of the rows, or None: no LayerNorm
    norm_bias_ptr,
    statistics_ptr,  # of ``normalise``, or None: computed here
    weight_ptr,  # (columns, inner), contiguous
    bias_ptr,
    multiplier_ptr,  # or None
    residual_ptr,  # contiguous, or None
    pre_ptr,  # for the value before the activation, contiguous, or None
    output_ptr,  # contiguous; None: the result takes the multiplier's place, if there is one
    eps,
    x_stride,
    multiplier_stride,
    rows,
    columns,
    inner,
    column_blocks,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """act(LayerNorm(x) · weightᵀ + bias) ⊙ multiplier + residual of one tile."""
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    # Neighbouring programs share their rows, which they read from the cache.
    row = program // column_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = program % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_valid, column_valid = row < rows, column < columns
    result = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if norm_weight_ptr is None:
        result = product(
            x_ptr, weight_ptr, result, row, row_valid, column, column_valid, x_stride, 1, inner, inner, 1,
            PRECISION, BLOCK_INNER,
        )  # fmt: skip
    else:
        pivot = load_pivot(x_ptr, row, row_valid, x_stride, "identity")
        if statistics_ptr is None:
            mean, scale = row_statistics(
                x_ptr, pivot, row, row_valid, x_stride, inner, eps, "identity", BLOCK_INNER
            )
        else:
            mean = tl.load(statistics_ptr + row, mask=row_valid, other=0.0)[:, None]
            scale = tl.load(statistics_ptr + rows + row, mask=row_valid, other=0.0)[:, None]
        for start in range(0, inner, BLOCK_INNER):
            k = start + tl.arange(0, BLOCK_INNER)
            valid = row_valid[:, None] & (k < inner)[None, :]
            x = load_shifted(x_ptr, row[:, None] * x_stride + k[None, :], valid, pivot, "identity")
            x = affine((x - mean) * scale, norm_weight_ptr, norm_bias_ptr, k[None, :], (k < inner)[None, :])
            weight = tl.load(
                weight_ptr + k[:, None] + column[None, :] * inner,
                mask=(k < inner)[:, None] & column_valid[None, :],
                other=0.0,
            )
            result = multiply(x.to(weight.dtype), weight, result, PRECISION)

    result += tl.load(bias_ptr + column, mask=column_valid, other=0.0).to(tl.float32)[None, :]
    valid = row_valid[:, None] & column_valid[None, :]
    address = row[:, None] * columns + column[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + address, result.to(pre_ptr.dtype.element_ty), mask=valid)
    if (output_ptr is not None) or (multiplier_ptr is not None):
        result = activate(result, ACTIVATION)
        if multiplier_ptr is not None:
            at = row[:, None] * multiplier_stride + column[None, :]
            result *= tl.load(multiplier_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            result += tl.load(residual_ptr + address, mask=valid, other=0.0).to(tl.float32)
        if output_ptr is not None:
            tl.store(output_ptr + address, result.to(output_ptr.dtype.element_ty), mask=valid)
        else:
            tl.store(multiplier_ptr + at, result.to(multiplier_ptr.dtype.element_ty), mask=valid)


@triton.jit
def mix_tokens(
    weight_ptr,  # (tokens, tokens), contiguous
    normed_ptr,  # (batch · tokens, columns), contiguous
    bias_ptr,  # one per token
    multiplier_ptr,  # u
    output_ptr,  # contiguous; None: the result takes the multiplier's place
    multiplier_stride,
    tokens,  # in units
    columns,
    row_blocks,
    column_blocks,
    TOKENS_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """(weight · normed + bias) ⊙ multiplier of one tile of one element of the batch."""
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    token_units = tokens
    tokens *= TOKENS_UNIT
    element = program // column_blocks // row_blocks
    token = program // column_blocks % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = program % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    token_valid, column_valid = token < tokens, column < columns
    bias = tl.load(bias_ptr + token, mask=token_valid, other=0.0).to(tl.float32)
    result = product(
        weight_ptr, normed_ptr + element * tokens * columns,
        tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32), token, token_valid, column, column_valid,
        tokens, columns, 1, token_units, TOKENS_UNIT, PRECISION, BLOCK_INNER,
    )  # fmt: skip
    result += bias[:, None]
    valid = token_valid[:, None] & column_valid[None, :]
    row = (element * tokens + token)[:, None]
    at = row * multiplier_stride + column[None, :]
    result *= tl.load(multiplier_ptr + at, mask=valid, other=0.0).to(tl.float32)
    result = result.to(normed_ptr.dtype.element_ty)
    if output_ptr is not None:
        tl.store(output_ptr + row * columns + column[None, :], result, mask=valid)
    else:
        tl.store(multiplier_ptr + at, result, mask=valid)
