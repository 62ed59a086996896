"""The whole gated MLP of mode "channel" in one Triton kernel: one read of x, one write of the result.

For rows narrow enough that a program holds LayerNorm(v) of its tokens, and their results, all along.
"""

import triton
import triton.language as tl

from degmix_kernels.epilogue import activate
from degmix_kernels.gating.kernels import affine, load_pivot, load_shifted, row_statistics, tile_statistics
from degmix_kernels.product import multiply


@triton.jit
def normed_product(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,  # (columns, channels)
    pivot,
    mean,
    scale,
    accumulator,
    row,
    row_valid,
    column,
    column_valid,
    channels,
    PRECISION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """accumulator + LayerNorm(x) · weightᵀ, by the statistics of x."""
    for start in range(0, channels, BLOCK_CHANNELS):
        k = start + tl.arange(0, BLOCK_CHANNELS)
        k_valid = k < channels
        valid = row_valid[:, None] & k_valid[None, :]
        x = load_shifted(x_ptr, row[:, None] * channels + k[None, :], valid, pivot, "identity")
        x = affine((x - mean) * scale, norm_weight_ptr, norm_bias_ptr, k[None, :], k_valid[None, :])
        weight = tl.load(
            weight_ptr + k[:, None] + column[None, :] * channels,
            mask=k_valid[:, None] & column_valid[None, :],
            other=0.0,
        )
        accumulator = multiply(x.to(weight.dtype), weight, accumulator, PRECISION)
    return accumulator


@triton.jit
def gated_mlp(
    x_ptr,  # (rows, channels), contiguous like all
    norm_weight_ptr,
    norm_bias_ptr,
    fc1_weight_ptr,  # (2 · hidden, channels): u before v
    fc1_bias_ptr,
    gate_norm_weight_ptr,
    gate_norm_bias_ptr,
    gate_weight_ptr,  # (hidden, hidden)
    gate_bias_ptr,
    fc2_weight_ptr,  # (channels, hidden)
    fc2_bias_ptr,
    output_ptr,
    eps,
    rows,
    channels,
    hidden,
    PRECISION: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,  # at least channels
    HIDDEN: tl.constexpr,  # at least hidden
    BLOCK_CHANNELS: tl.constexpr,  # at a time
    BLOCK_HIDDEN: tl.constexpr,
):
    """A block of rows."""
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = row < rows
    channel = tl.arange(0, CHANNELS)
    channel_valid = channel < channels
    wide = tl.arange(0, HIDDEN)
    wide_valid = wide < hidden
    dtype = x_ptr.dtype.element_ty

    pivot = load_pivot(x_ptr, row, row_valid, channels, "identity")
    mean, scale = row_statistics(
        x_ptr, pivot, row, row_valid, channels, channels, eps, "identity", BLOCK_CHANNELS
    )

    # v, for all hidden channels: its LayerNorm needs them, and so does every product with the gate's weight.
    v = tl.zeros((BLOCK_ROWS, HIDDEN), tl.float32)
    v = normed_product(
        x_ptr, norm_weight_ptr, norm_bias_ptr, fc1_weight_ptr + hidden * channels, pivot, mean, scale, v,
        row, row_valid, wide, wide_valid, channels, PRECISION, BLOCK_CHANNELS,
    )  # fmt: skip
    v += tl.load(fc1_bias_ptr + hidden + wide, mask=wide_valid, other=0.0).to(tl.float32)[None, :]
    valid_wide = row_valid[:, None] & wide_valid[None, :]
    v = tl.where(valid_wide, activate(v, "gelu"), 0.0)
    # Its mean twice: of what the first leaves, the second is as exact as it is small.
    v = tl.where(valid_wide, v - tl.sum(v, axis=1, keep_dims=True) / hidden, 0.0)
    gate_mean, gate_scale = tile_statistics(v, valid_wide, hidden, eps)
    v = affine(
        (v - gate_mean) * gate_scale, gate_norm_weight_ptr, gate_norm_bias_ptr, wide[None, :],
        wide_valid[None, :],
    ).to(dtype)  # fmt: skip

    result = tl.zeros((BLOCK_ROWS, CHANNELS), tl.float32)
    for start in range(0, hidden, BLOCK_HIDDEN):
        k = start + tl.arange(0, BLOCK_HIDDEN)
        k_valid = k < hidden
        u = normed_product(
            x_ptr, norm_weight_ptr, norm_bias_ptr, fc1_weight_ptr, pivot, mean, scale,
            tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32), row, row_valid, k, k_valid, channels, PRECISION,
            BLOCK_CHANNELS,
        )  # fmt: skip
        u += tl.load(fc1_bias_ptr + k, mask=k_valid, other=0.0).to(tl.float32)[None, :]
        weight = tl.load(
            gate_weight_ptr + k[None, :] * hidden + wide[:, None],
            mask=k_valid[None, :] & wide_valid[:, None],
            other=0.0,
        )
        mixed = multiply(v, weight, tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32), PRECISION)
        mixed += tl.load(gate_bias_ptr + k, mask=k_valid, other=0.0).to(tl.float32)[None, :]
        gated = (activate(u, "gelu") * mixed).to(dtype)
        weight = tl.load(
            fc2_weight_ptr + channel[None, :] * hidden + k[:, None],
            mask=k_valid[:, None] & channel_valid[None, :],
            other=0.0,
        )
        result = multiply(gated, weight, result, PRECISION)
    result += tl.load(fc2_bias_ptr + channel, mask=channel_valid, other=0.0).to(tl.float32)[None, :]
    valid = row_valid[:, None] & channel_valid[None, :]
    address = row[:, None] * channels + channel[None, :]
    result += tl.load(x_ptr + address, mask=valid, other=0.0).to(tl.float32)
    tl.store(output_ptr + address, result.to(dtype), mask=valid)
