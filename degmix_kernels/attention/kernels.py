"""Triton kernel of ``gated_attention``, forward, and what the backward kernels share with it.

A program owns a block of one head's queries and goes over all keys: softmax by running maximum and sum, in
fp32 and to the base 2. Every stride arrives divided by ``UNIT``, so that the compiler knows how wide it may
load. Padding of the head dimension up to a power of two is zeros, which add nothing to a product.
"""

import triton
import triton.language as tl

from degmix_kernels.product import multiply

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def load_tokens(
    pointer, token, tokens, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """(tokens, BLOCK_DIM) at ``pointer``, a tile of addresses; MASKED: zeros from token ``tokens`` on."""
    column = tl.arange(0, BLOCK_DIM)[None, :]
    if MASKED and BLOCK_DIM != HEAD_DIM:
        return tl.load(pointer, mask=(token[:, None] < tokens) & (column < HEAD_DIM), other=0.0)
    if MASKED:
        return tl.load(pointer, mask=token[:, None] < tokens, other=0.0)
    if BLOCK_DIM != HEAD_DIM:
        return tl.load(pointer, mask=column < HEAD_DIM, other=0.0)
    return tl.load(pointer)


@triton.jit
def store_tokens(pointer, tile, token, tokens, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Write the part of a (tokens, BLOCK_DIM) tile that is no padding."""
    column = tl.arange(0, BLOCK_DIM)[None, :]
    valid = (token[:, None] < tokens) & (column < HEAD_DIM)
    tl.store(pointer, tile.to(pointer.dtype.element_ty), mask=valid)


@triton.jit
def block_of_head(blocks, heads, INDEX_64: tl.constexpr):
    """Batch and head, as one index and as two, and this program's block of tokens: blocks are fastest."""
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    sequence, block = program // blocks, program % blocks
    return sequence, sequence // heads, sequence % heads, block


@triton.jit
def forward(
    query_ptr,
    key_ptr,
    value_ptr,
    gate_ptr,  # laid out as output, or None
    residual_ptr,  # laid out as output, or None
    output_ptr,
    attended_ptr,  # laid out as output: before gate and residual; or None
    log_sum_ptr,  # (batch, heads, queries) fp32, or None
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    output_stride_b,
    output_stride_h,
    output_stride_n,
    score_scale,  # log₂ e / √D
    heads,
    queries,
    keys,
    blocks,
    whole,  # keys in whole blocks
    UNIT: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Softmax attention of one block of queries over all keys, gate and residual."""
    sequence, batch, head, block = block_of_head(blocks, heads, INDEX_64)
    token = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    column = tl.arange(0, BLOCK_DIM)[None, :]
    query_ptr += (batch * query_stride_b + head * query_stride_h) * UNIT
    key_ptr += (batch * key_stride_b + head * key_stride_h) * UNIT
    value_ptr += (batch * value_stride_b + head * value_stride_h) * UNIT
    address = query_ptr + token[:, None] * (query_stride_n * UNIT) + column
    query = load_tokens(address, token, queries, True, HEAD_DIM, BLOCK_DIM)

    # The lowest finite number: scores of -inf get a weight of 0, where -inf minus -inf would be NaN.
    maximum = tl.full((BLOCK_QUERIES,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    output = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
    # Only the last block of keys can be ragged: the others need no masks.
    for MASKED in tl.static_range(2):
        start, end = whole if MASKED else 0, keys if MASKED else whole
        for first in tl.range(start, end, BLOCK_KEYS, num_stages=1 if MASKED else None):
            key_token = first + tl.arange(0, BLOCK_KEYS)
            if INDEX_64:
                key_token = key_token.to(tl.int64)
            key_at = key_ptr + key_token[:, None] * (key_stride_n * UNIT) + column
            key = load_tokens(key_at, key_token, keys, MASKED, HEAD_DIM, BLOCK_DIM)
            scores = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
            scores = multiply(query, tl.trans(key), scores, PRECISION)
            if MASKED:
                scores = tl.where(key_token[None, :] < keys, scores, float("-inf"))
            larger = tl.maximum(maximum, tl.max(scores, axis=1) * score_scale)
            weights = tl.exp2(scores * score_scale - larger[:, None])
            shrink = tl.exp2(maximum - larger)
            total = total * shrink + tl.sum(weights, axis=1)
            output *= shrink[:, None]
            value_at = value_ptr + key_token[:, None] * (value_stride_n * UNIT) + column
            value = load_tokens(value_at, key_token, keys, MASKED, HEAD_DIM, BLOCK_DIM)
            output = multiply(weights.to(value.dtype), value, output, PRECISION)
            maximum = larger

    # A query all of whose scores are -inf attends to nothing: 0, as PyTorch has it.
    empty = total == 0
    output *= (1 / tl.where(empty, 1.0, total))[:, None]
    if log_sum_ptr is not None:
        log_sum = tl.where(empty, float("inf"), maximum + tl.log2(total))
        tl.store(log_sum_ptr + sequence * queries + token, log_sum, mask=token < queries)
    offset = (batch * output_stride_b + head * output_stride_h) * UNIT
    offset += token[:, None] * (output_stride_n * UNIT) + column
    if attended_ptr is not None:
        store_tokens(attended_ptr + offset, output, token, queries, HEAD_DIM, BLOCK_DIM)
    if gate_ptr is not None:
        gate = load_tokens(gate_ptr + offset, token, queries, True, HEAD_DIM, BLOCK_DIM)
        output *= gate.to(tl.float32)
    if residual_ptr is not None:
        residual = load_tokens(residual_ptr + offset, token, queries, True, HEAD_DIM, BLOCK_DIM)
        output += residual.to(tl.float32)
    store_tokens(output_ptr + offset, output, token, queries, HEAD_DIM, BLOCK_DIM)
