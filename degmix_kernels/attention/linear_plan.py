"""Launches of ``linear_attention``'s kernels. Plans touch no memory."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels.attention import linear_kernels
from degmix_kernels.attention.plan import padded, strides
from degmix_kernels.launch import Launch, needs_64_bit
from degmix_kernels.maps import ceil_div
from degmix_kernels.product import precision

# Programs that keep a GPU busy. Not the GPU's own number of multiprocessors: sums would then differ between
# GPUs.
_PROGRAMS = 512


def plan_multiply_tokens(left: Tensor, right: Tensor, scale: float) -> tuple[Launch, Tensor]:
    """leftᵀ · right · scale over the tokens of each head.

    Args:
        left: (B, heads, N, D), channels contiguous.
        right: (B, heads, N, D), channels contiguous.
        scale: factor.

    Returns:
        The launch and what it fills: parts of the sum, (B, heads, splits, D, D), fp32.
    """
    batch, heads, tokens, head_dim = left.shape
    block_dim = padded(head_dim)
    if left.dtype == torch.float32:  # whose products keep their operands in registers
        block, rows, warps, stages = 32, min(block_dim, 32), 4, 1
    else:
        block, rows, warps, stages = 64, block_dim, 8 if block_dim > 64 else 4, 2
    row_blocks = ceil_div(head_dim, rows)
    blocks = ceil_div(tokens, block)
    splits = min(blocks, ceil_div(_PROGRAMS, max(batch * heads * row_blocks, 1)))
    steps = ceil_div(blocks, max(splits, 1))
    splits = max(ceil_div(blocks, max(steps, 1)), 1)  # no tokens: one part, zero
    parts = left.new_empty((batch, heads, splits, head_dim, head_dim), dtype=torch.float32)
    named, unit = strides(left=left, right=right)
    launch = Launch(
        linear_kernels.multiply_tokens,
        batch * heads * splits * row_blocks,
        {
            "left_ptr": left,
            "right_ptr": right,
            "product_ptr": parts,
            **named,
            "scale": scale,
            "heads": heads,
            "tokens": tokens,
            "splits": splits,
            "row_blocks": row_blocks,
            "steps": steps,
        },
        {
            "UNIT": unit,
            "INDEX_64": needs_64_bit(left, right, parts),
            "PRECISION": precision(left.dtype),
            "HEAD_DIM": head_dim,
            "BLOCK_TOKENS": block,
            "BLOCK_ROWS": rows,
            "BLOCK_DIM": block_dim,
        },
        num_warps=warps,
        num_stages=stages,
    )
    return launch, parts


def plan_apply_matrix(tokens: Tensor, matrix: Tensor, transposed: bool, output: Tensor) -> Launch:
    """tokens · matrix of each head: (B, heads, N, D), channels contiguous, and (B, heads, D, D), fp32."""
    batch, heads, length, head_dim = tokens.shape
    block_dim = padded(head_dim)
    if tokens.dtype == torch.float32:  # as above
        block, inner, warps = 32, min(block_dim, 32), 4
    else:
        block, inner, warps = 128, block_dim, 8 if block_dim > 64 else 4
    token_blocks = ceil_div(length, block)
    named, unit = strides(tokens=tokens, output=output)
    return Launch(
        linear_kernels.apply_matrix,
        batch * heads * token_blocks,
        {
            "tokens_ptr": tokens,
            "matrix_ptr": matrix,
            "output_ptr": output,
            **named,
            "heads": heads,
            "tokens": length,
            "token_blocks": token_blocks,
        },
        {
            "TRANSPOSED": transposed,
            "UNIT": unit,
            "INDEX_64": needs_64_bit(tokens, output, matrix),
            "PRECISION": precision(tokens.dtype),
            "HEAD_DIM": head_dim,
            "BLOCK_TOKENS": block,
            "BLOCK_INNER": inner,
            "BLOCK_DIM": block_dim,
        },
        num_warps=warps,
    )
