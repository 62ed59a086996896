"""Triton kernels of ``linear_attention``: products over a head's tokens, and of its tokens with a matrix.

Forward and backward are these two, with roles exchanged. Both read each token once, and take any strides of
batch, head and token (divided by ``UNIT``), where a library's batched product would want copies of views that
come from heads split off channels.
"""

import triton
import triton.language as tl

from degmix_kernels.attention.kernels import block_of_head, load_tokens, store_tokens
from degmix_kernels.product import multiply


@triton.jit
def multiply_tokens(
    left_ptr,
    right_ptr,
    product_ptr,  # (batch · heads, splits, HEAD_DIM, HEAD_DIM) fp32
    left_stride_b,
    left_stride_h,
    left_stride_n,
    right_stride_b,
    right_stride_h,
    right_stride_n,
    scale,
    heads,
    tokens,
    splits,
    row_blocks,
    steps,  # blocks of tokens of a split
    UNIT: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Some rows of leftᵀ · right · scale over one split of the tokens: Σ left[n, i] · right[n, j]."""
    parts = splits * row_blocks
    sequence, batch, head, part = block_of_head(parts, heads, INDEX_64)
    split, row_block = part // row_blocks, part % row_blocks
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    left_ptr += (batch * left_stride_b + head * left_stride_h) * UNIT + row[None, :]
    right_ptr += (batch * right_stride_b + head * right_stride_h) * UNIT + column[None, :]
    product = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for step in range(steps):
        token = (split * steps + step) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        valid = token[:, None] < tokens
        address = left_ptr + token[:, None] * (left_stride_n * UNIT)
        left = tl.load(address, mask=valid & (row[None, :] < HEAD_DIM), other=0.0)
        address = right_ptr + token[:, None] * (right_stride_n * UNIT)
        right = load_tokens(address, token, tokens, True, HEAD_DIM, BLOCK_DIM)
        product = multiply(tl.trans(left), right, product, PRECISION)
    product_ptr += (sequence * splits + split) * HEAD_DIM * HEAD_DIM
    product_ptr += row[:, None] * HEAD_DIM + column[None, :]
    valid = (row[:, None] < HEAD_DIM) & (column[None, :] < HEAD_DIM)
    tl.store(product_ptr, product * scale, mask=valid)


@triton.jit
def apply_matrix(
    tokens_ptr,
    matrix_ptr,  # (batch · heads, HEAD_DIM, HEAD_DIM) fp32
    output_ptr,
    tokens_stride_b,
    tokens_stride_h,
    tokens_stride_n,
    output_stride_b,
    output_stride_h,
    output_stride_n,
    heads,
    tokens,
    token_blocks,
    TRANSPOSED: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """tokens · matrix, or tokens · matrixᵀ, for one block of tokens of one head."""
    sequence, batch, head, block = block_of_head(token_blocks, heads, INDEX_64)
    token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.arange(0, BLOCK_DIM)[None, :]
    inner = tl.arange(0, BLOCK_INNER)
    tokens_ptr += (batch * tokens_stride_b + head * tokens_stride_h) * UNIT
    tokens_ptr += token[:, None] * (tokens_stride_n * UNIT) + inner[None, :]
    matrix_ptr += sequence * HEAD_DIM * HEAD_DIM
    if TRANSPOSED:
        matrix_ptr += column * HEAD_DIM + inner[:, None]
    else:
        matrix_ptr += inner[:, None] * HEAD_DIM + column
    output = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), tl.float32)
    factor = 1.0
    for first in range(0, BLOCK_DIM, BLOCK_INNER):
        valid = first + inner < HEAD_DIM
        tile = tl.load(tokens_ptr + first, mask=(token[:, None] < tokens) & valid[None, :], other=0.0)
        step = first if TRANSPOSED else first * HEAD_DIM
        matrix = tl.load(matrix_ptr + step, mask=valid[:, None] & (column < HEAD_DIM), other=0.0)
        if tokens_ptr.dtype.element_ty == tl.float16:
            # Sums over many tokens may lie beyond fp16, or below it: a power of two brings them next to 1.
            # (All of the matrix is here at once: only fp32 is multiplied in parts.)
            largest = tl.max(tl.max(tl.abs(matrix), axis=1), axis=0)
            sound = (largest > 1e-30) & (largest < 1e30)
            factor = tl.exp2(tl.floor(tl.log2(tl.where(sound, largest, 1.0))))
            matrix *= 1 / factor
        output = multiply(tile, matrix.to(tile.dtype), output, PRECISION)
    output_ptr += (batch * output_stride_b + head * output_stride_h) * UNIT
    output_ptr += token[:, None] * (output_stride_n * UNIT) + column
    store_tokens(output_ptr, output * factor, token, tokens, HEAD_DIM, BLOCK_DIM)
