"""Triton kernels of ``gated_attention``, backward: one pass over the gradient, one per side of the scores.

Weights are computed again from the logarithm of their sum, base 2. With o the attended values, g the gradient
that reaches them and d = Σ g·o of a query, the gradient of a score is w·(g·v − d).
"""

import triton
import triton.language as tl

from degmix_kernels.attention.kernels import block_of_head, load_tokens, store_tokens
from degmix_kernels.product import multiply


@triton.jit
def prepare(
    grad_ptr,  # of the result; all tiles here are laid out alike
    gate_ptr,  # or None
    attended_ptr,
    grad_gate_ptr,  # or None
    grad_attended_ptr,  # or None, as without a gate: then grad is that gradient itself
    delta_ptr,  # (batch, heads, queries) fp32, or None
    stride_b,
    stride_h,
    stride_n,
    heads,
    queries,
    query_blocks,
    UNIT: tl.constexpr,
    INDEX_64: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """The gradients of the gate and of the attended values, and the latter's product with these."""
    sequence, batch, head, block = block_of_head(query_blocks, heads, INDEX_64)
    token = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    offset = (batch * stride_b + head * stride_h) * UNIT
    offset += token[:, None] * (stride_n * UNIT) + tl.arange(0, BLOCK_DIM)[None, :]
    grad = load_tokens(grad_ptr + offset, token, queries, True, HEAD_DIM, BLOCK_DIM).to(tl.float32)
    attended = load_tokens(attended_ptr + offset, token, queries, True, HEAD_DIM, BLOCK_DIM).to(tl.float32)
    if grad_gate_ptr is not None:
        store_tokens(grad_gate_ptr + offset, grad * attended, token, queries, HEAD_DIM, BLOCK_DIM)
    if grad_attended_ptr is not None:
        gate = load_tokens(gate_ptr + offset, token, queries, True, HEAD_DIM, BLOCK_DIM)
        rounded = (grad * gate.to(tl.float32)).to(grad_attended_ptr.dtype.element_ty)
        store_tokens(grad_attended_ptr + offset, rounded, token, queries, HEAD_DIM, BLOCK_DIM)
        grad = rounded.to(tl.float32)  # as the products with the values have it
    if delta_ptr is not None:
        delta = tl.sum(grad * attended, axis=1)
        tl.store(delta_ptr + sequence * queries + token, delta, mask=token < queries)


@triton.jit
def backward_query(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,  # of the attended values, laid out as grad_query
    log_sum_ptr,  # (batch, heads, queries), as delta_ptr
    delta_ptr,
    grad_query_ptr,
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
    scale,  # 1 / √D
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
    """The gradient of one block of queries."""
    sequence, batch, head, block = block_of_head(blocks, heads, INDEX_64)
    token = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    column = tl.arange(0, BLOCK_DIM)[None, :]
    query_ptr += (batch * query_stride_b + head * query_stride_h) * UNIT
    key_ptr += (batch * key_stride_b + head * key_stride_h) * UNIT
    value_ptr += (batch * value_stride_b + head * value_stride_h) * UNIT
    offset = (batch * output_stride_b + head * output_stride_h) * UNIT
    offset += token[:, None] * (output_stride_n * UNIT) + column
    address = query_ptr + token[:, None] * (query_stride_n * UNIT) + column
    query = load_tokens(address, token, queries, True, HEAD_DIM, BLOCK_DIM)
    grad = load_tokens(grad_ptr + offset, token, queries, True, HEAD_DIM, BLOCK_DIM)
    rows = sequence * queries + token
    log_sum = tl.load(log_sum_ptr + rows, mask=token < queries, other=0.0)
    delta = tl.load(delta_ptr + rows, mask=token < queries, other=0.0)

    grad_query = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
    for MASKED in tl.static_range(2):
        start, end = whole if MASKED else 0, keys if MASKED else whole
        for first in tl.range(start, end, BLOCK_KEYS, num_stages=1 if MASKED else None):
            key_token = first + tl.arange(0, BLOCK_KEYS)
            if INDEX_64:
                key_token = key_token.to(tl.int64)
            key_at = key_ptr + key_token[:, None] * (key_stride_n * UNIT) + column
            key = load_tokens(key_at, key_token, keys, MASKED, HEAD_DIM, BLOCK_DIM)
            value_at = value_ptr + key_token[:, None] * (value_stride_n * UNIT) + column
            value = load_tokens(value_at, key_token, keys, MASKED, HEAD_DIM, BLOCK_DIM)
            nothing = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
            scores = multiply(query, tl.trans(key), nothing, PRECISION)
            weights = tl.exp2(scores * score_scale - log_sum[:, None])
            grad_scores = weights * (multiply(grad, tl.trans(value), nothing, PRECISION) - delta[:, None])
            if MASKED:  # beside scores below -128 the weight of a key that is not there overflows
                grad_scores = tl.where(key_token[None, :] < keys, grad_scores, 0.0)
            grad_query = multiply(grad_scores.to(key.dtype), key, grad_query, PRECISION)
    store_tokens(grad_query_ptr + offset, grad_query * scale, token, queries, HEAD_DIM, BLOCK_DIM)


@triton.jit
def backward_context(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,  # of the attended values
    log_sum_ptr,  # (batch, heads, queries), as delta_ptr
    delta_ptr,  # or None where grad_key is not wanted
    grad_key_ptr,  # or None
    grad_value_ptr,  # or None
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    output_stride_b,  # of grad_ptr
    output_stride_h,
    output_stride_n,
    context_stride_b,  # of grad_key_ptr and grad_value_ptr
    context_stride_h,
    context_stride_n,
    scale,  # 1 / √D
    score_scale,  # log₂ e / √D
    heads,
    queries,
    keys,
    blocks,
    whole,  # queries in whole blocks
    UNIT: tl.constexpr,
    INDEX_64: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """The gradients of one block of keys and of their values."""
    sequence, batch, head, block = block_of_head(blocks, heads, INDEX_64)
    token = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    column = tl.arange(0, BLOCK_DIM)[None, :]
    query_ptr += (batch * query_stride_b + head * query_stride_h) * UNIT
    grad_ptr += (batch * output_stride_b + head * output_stride_h) * UNIT
    log_sum_ptr += sequence * queries
    if grad_key_ptr is not None:
        delta_ptr += sequence * queries
    key_ptr += (batch * key_stride_b + head * key_stride_h) * UNIT
    key_ptr += token[:, None] * (key_stride_n * UNIT) + column
    key = load_tokens(key_ptr, token, keys, True, HEAD_DIM, BLOCK_DIM)
    value = key
    if grad_key_ptr is not None:
        value_ptr += (batch * value_stride_b + head * value_stride_h) * UNIT
        value_ptr += token[:, None] * (value_stride_n * UNIT) + column
        value = load_tokens(value_ptr, token, keys, True, HEAD_DIM, BLOCK_DIM)

    grad_key = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)
    grad_value = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)
    # Scores are (keys, queries) here, so that both sums are plain products.
    for MASKED in tl.static_range(2):
        start, end = whole if MASKED else 0, queries if MASKED else whole
        for first in tl.range(start, end, BLOCK_QUERIES, num_stages=1 if MASKED else None):
            query_token = first + tl.arange(0, BLOCK_QUERIES)
            if INDEX_64:
                query_token = query_token.to(tl.int64)
            query_at = query_ptr + query_token[:, None] * (query_stride_n * UNIT) + column
            query = load_tokens(query_at, query_token, queries, MASKED, HEAD_DIM, BLOCK_DIM)
            grad_at = grad_ptr + query_token[:, None] * (output_stride_n * UNIT) + column
            grad = load_tokens(grad_at, query_token, queries, MASKED, HEAD_DIM, BLOCK_DIM)
            valid, absent = query_token < queries if MASKED else None, 0.0 if MASKED else None
            nothing = tl.zeros((BLOCK_KEYS, BLOCK_QUERIES), tl.float32)
            scores = multiply(key, tl.trans(query), nothing, PRECISION)
            log_sum = tl.load(log_sum_ptr + query_token, mask=valid, other=absent)
            weights = tl.exp2(scores * score_scale - log_sum[None, :])
            if MASKED:
                weights = tl.where(valid[None, :], weights, 0.0)
            if grad_value_ptr is not None:
                grad_value = multiply(weights.to(grad.dtype), grad, grad_value, PRECISION)
            if grad_key_ptr is not None:
                delta = tl.load(delta_ptr + query_token, mask=valid, other=absent)
                grad_scores = weights * (multiply(value, tl.trans(grad), nothing, PRECISION) - delta[None, :])
                if MASKED:  # an infinite value times the zero that is not there
                    grad_scores = tl.where(valid[None, :], grad_scores, 0.0)
                grad_key = multiply(grad_scores.to(query.dtype), query, grad_key, PRECISION)
    offset = (batch * context_stride_b + head * context_stride_h) * UNIT
    offset += token[:, None] * (context_stride_n * UNIT) + column
    if grad_key_ptr is not None:
        store_tokens(grad_key_ptr + offset, grad_key * scale, token, keys, HEAD_DIM, BLOCK_DIM)
    if grad_value_ptr is not None:
        store_tokens(grad_value_ptr + offset, grad_value, token, keys, HEAD_DIM, BLOCK_DIM)
