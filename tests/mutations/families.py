"""Bugs in the kernels and plans of every family but the deformable convolution."""

from __future__ import annotations

from tests.mutations.mutation import FP32, Mutation, select

BATCH_NORM = (
    Mutation(
        "batch_norm: eps is forgotten on the way back",
        "degmix_kernels/batch_norm/kernels.py",
        "deviation = tl.rsqrt(vector(variance_ptr, channel, channel_valid) + eps)",
        "deviation = tl.rsqrt(vector(variance_ptr, channel, channel_valid))",
        (select("test_contract", FP32 + "batch_norm"),),
    ),
    Mutation(
        "batch_norm: no residual without a bias",
        "degmix_kernels/batch_norm/kernels.py",
        "if residual_ptr is not None:",
        "if (residual_ptr is not None) and (bias_ptr is not None):",
        (select("test_contract", FP32 + "batch_norm"),),
    ),
    Mutation(
        "batch_norm: the last pixel is not written",
        "degmix_kernels/map_kernels.py",
        "valid = row_valid[:, None] & (pixel < pixels)",
        "valid = row_valid[:, None] & (pixel < pixels - 1)",
        (
            select("test_contract", FP32 + "batch_norm"),
            select("kernels/test_coordinate_bias", "first_middle or non_contiguous"),
        ),
    ),
    Mutation(
        "batch_norm: x is read where nothing needs it",
        "degmix_kernels/batch_norm/plan.py",
        '"x_ptr": x if products else None,',
        '"x_ptr": x,',
        (select("kernels/test_batch_norm", "only_what_is_wanted"),),
    ),
    Mutation(
        "batch_norm: wide loads where rows are not aligned",
        "degmix_kernels/maps.py",
        "return largest_unit(self.channels if self.last else self.pixels)",
        "return largest_unit(self.channels)",
        (select("kernels/test_batch_norm", "plans_know"),),
    ),
    Mutation(
        "batch_norm: the running variance is the biased one",
        "degmix_kernels/batch_norm/running.py",
        "variances = torch._foreach_mul(variances, count / (count - 1))",
        "variances = list(variances)",
        (select("kernels/test_batch_norm", "running_ones"),),
    ),
)

CHANNEL_MIX = (
    Mutation(
        "channel_mix: every group reads the first one's channels",
        "degmix_kernels/channel_mix/kernels.py",
        "x_ptr += image * channels * pixels + group * inner * (1 if LAST else pixels)",
        "x_ptr += image * channels * pixels + group * inner",
        (select("test_contract", FP32 + "channel_mix"),),
    ),
    Mutation(
        "channel_mix: the norm's weight is in x̂, too",
        "degmix_kernels/channel_mix/kernels.py",
        "deviation = scale_of(variance_ptr, None, eps, row, row_valid)[:, None]",
        "deviation = scale_of(variance_ptr, norm_weight_ptr, eps, row, row_valid)[:, None]",
        (select("test_contract", FP32 + "channel_mix"),),
    ),
    Mutation(
        "channel_mix: the second half of a tile is stored over the first",
        "degmix_kernels/channel_mix/kernels.py",
        "pixel_start + BLOCK // 2, channels, pixels, ACTIVATION, LAST, PART,",
        "pixel_start, channels, pixels, ACTIVATION, LAST, PART,",
        (select("test_contract", FP32 + "channel_mix"),),
    ),
    Mutation(
        "channel_mix: statistics in parts in the input's dtype",
        "degmix_kernels/channel_mix/plan.py",
        "*(weight.new_empty(shape, dtype=torch.float32) for _ in range(2))",
        "*(weight.new_empty(shape) for _ in range(2))",
        (select("kernels/test_channel_mix", "half_precision_keeps"),),
    ),
)

LINEAR_NORM = (
    Mutation(
        "linear_norm: padding is part of the variance",
        "degmix_kernels/linear_norm/kernels.py",
        "z = tl.where(out_valid[:, None], z - mean, 0.0)",
        "z = z - mean",
        (select("test_contract", FP32 + "linear_norm"),),
    ),
    Mutation(
        "linear_norm: every block's gradient is read from the first one's pixels",
        "degmix_kernels/linear_norm/kernels.py",
        "image = block + image",
        "image = image",
        (select("kernels/test_linear_norm", "blocks_are_calls"),),
    ),
    Mutation(
        "linear_norm: a mean on the way back without the norm's weight",
        "degmix_kernels/linear_norm/kernels.py",
        "slope = tl.sum(product * weight, axis=0, keep_dims=True) / channels",
        "slope = tl.sum(product, axis=0, keep_dims=True) / channels",
        (select("test_contract", FP32 + "linear_norm"),),
    ),
    Mutation(
        "linear_norm: tiles of a last, smaller part are left out",
        "degmix_kernels/linear_norm/plan.py",
        "parts = ceil_div(tiles, max(steps, 1))",
        "parts = tiles // max(steps, 1)",
        (select("kernels/test_linear_norm", "parts_end"),),
    ),
    Mutation(
        "linear_norm: large sums of gradients have 32-bit addresses",
        "degmix_kernels/linear_norm/plan.py",
        '"INDEX_64": needs_64_bit(normed, sums),',
        '"INDEX_64": needs_64_bit(normed),',
        (select("kernels/test_linear_norm", "64_bit"),),
    ),
)

TASK_ATTENTION = (
    Mutation(
        "task_attention: the scores' maximum is not scaled",
        "degmix_kernels/task_attention/kernels.py",
        "largest = tl.maximum(largest, scores[task] * scale)",
        "largest = tl.maximum(largest, scores[task])",
        (select("kernels/test_task_attention", "thousands"),),
    ),
    Mutation(
        "task_attention: a key that is the value loses the value's gradient where heads share it",
        "degmix_kernels/task_attention/kernels.py",
        "if value_ptr is None:\n                    grad_keys",
        "if (value_ptr is None) and (HEADS > 1):\n                    grad_keys",
        (select("test_contract", FP32 + "task_attention"),),
    ),
    Mutation(
        "task_attention: 32-bit addresses, always",
        "degmix_kernels/task_attention/plan.py",
        '"INDEX_64": needs_64_bit(*others),',
        '"INDEX_64": False,',
        (select("kernels/test_task_attention", "plans_know"),),
    ),
    Mutation(
        "task_attention: all of a batch's outputs in one image",
        "degmix_kernels/task_attention/kernels.py",
        "output_ptr += (image * query_tasks * rows + row) * sharing * HEAD_DIM + channel",
        "output_ptr += (image * rows + row) * sharing * HEAD_DIM + channel",
        (select("test_contract", FP32 + "task_attention"),),
    ),
)

GATING = (
    Mutation(
        "gating: padding is part of the variance",
        "degmix_kernels/gating/kernels.py",
        "centred = tl.where(valid, shifted - mean, 0.0)\n    return mean,",
        "centred = shifted - mean\n    return mean,",
        (select("kernels/test_gating", "ragged_tiles and float32"),),
    ),
    Mutation(
        "gating: u is read as if it were contiguous",
        "degmix_kernels/gating/kernels.py",
        "at = row * multiplier_stride + column[None, :]",
        "at = row * columns + column[None, :]",
        (select("kernels/test_gating", "ragged_tiles and float32"),),
    ),
    Mutation(
        "gating: the residual has no part in the gradient",
        "degmix_kernels/gating/backward_kernels.py",
        "            result += other\n",
        "",
        (select("kernels/test_gating", "ragged_tiles and float32"),),
    ),
    Mutation(
        "gating: sums of two images on one row",
        "degmix_kernels/gating/backward_kernels.py",
        "part = element * column_blocks + column_block",
        "part = element + column_block",
        (select("kernels/test_gating", "ragged_tiles and bfloat16"),),
    ),
    Mutation(
        "gating: the last image counts twice in the token weight",
        "degmix_kernels/gating/backward_kernels.py",
        "end = tl.where(element < batch, tokens, 0)  # the last part may end past the batch",
        "end = tokens",
        (select("kernels/test_gating", "sums_over_several"),),
    ),
    Mutation(
        "gating: a launch more, for statistics that no one shares",
        "degmix_kernels/gating/plan.py",
        "return ceil_div(columns, tiles.columns) > 2",
        "return ceil_div(columns, tiles.columns) > 0",
        (select("kernels/test_gating", "test_launches"),),
    ),
    Mutation(
        "gating: halves of a tensor are copied",
        "degmix_kernels/gating/plan.py",
        "return tensor if even and dense else tensor.contiguous()",
        "return tensor.contiguous()",
        (select("kernels/test_gating", "halves or memory"),),
    ),
)

ATTENTION = (
    Mutation(
        "gated_attention: a query that sees no key",
        "degmix_kernels/attention/kernels.py",
        "maximum = tl.full((BLOCK_QUERIES,), LOWEST, tl.float32)",
        'maximum = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)',
        (select("kernels/test_attention", "minus_infinity"),),
    ),
    Mutation(
        "gated_attention: one key too many",
        "degmix_kernels/attention/kernels.py",
        'scores = tl.where(token[None, :] < keys, scores, float("-inf"))',
        'scores = tl.where(token[None, :] <= keys, scores, float("-inf"))',
        (select("kernels/test_attention", "gated_kernels and float32"),),
    ),
    Mutation(
        "gated_attention: the query's gradient to the base 2",
        "degmix_kernels/attention/backward_kernels.py",
        "store_tokens(grad_query_ptr + offset, grad_query * scale,",
        "store_tokens(grad_query_ptr + offset, grad_query * score_scale,",
        (select("kernels/test_attention", "gated_kernels and float32"),),
    ),
    Mutation(
        "gated_attention: the gradient of a gated value without the gate",
        "degmix_kernels/attention/backward_kernels.py",
        "rounded = (grad * gate.to(tl.float32)).to(",
        "rounded = grad.to(",
        (select("kernels/test_attention", "gated_kernels and float32"),),
    ),
    Mutation(
        "gated_attention: keys are read at the distances of queries",
        "degmix_kernels/attention/plan.py",
        "steps, unit = strides(query=query, key=key, value=value, output=output)",
        "steps, unit = strides(query=query, key=query, value=value, output=output)",
        (select("kernels/test_attention", "views_that_share or registered"),),
    ),
    Mutation(
        "linear_attention: a last, smaller split is left out",
        "degmix_kernels/attention/linear_plan.py",
        "splits = max(ceil_div(blocks, max(steps, 1)), 1)",
        "splits = max(blocks // max(steps, 1), 1)",
        (select("kernels/test_attention", "splits"),),
    ),
    Mutation(
        "linear_attention: sums in half precision",
        "degmix_kernels/attention/linear_plan.py",
        "parts = left.new_empty((batch, heads, splits, head_dim, head_dim), dtype=torch.float32)",
        "parts = left.new_empty((batch, heads, splits, head_dim, head_dim))",
        (select("kernels/test_attention", "beyond_half"),),
    ),
)

COORDINATE_BIAS = (
    Mutation(
        "coordinate_bias: the border of a narrow map",
        "degmix_kernels/coordinate_bias/kernels.py",
        "tl.where(position == size - 1, tl.minimum(size, 3) - 1, tl.minimum(position, 1))",
        "tl.where(position == size - 1, tl.minimum(size, 2), tl.minimum(position, 1))",
        (select("kernels/test_coordinate_bias", "first_middle or non_contiguous"),),
    ),
    Mutation(
        "coordinate_bias: a table in the map's dtype",
        "degmix_kernels/coordinate_bias/kernels.py",
        "mask=valid & by_row, other=0.0).to(tl.float32)",
        "mask=valid & by_row, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)",
        (select("kernels/test_coordinate_bias", "precision"),),
    ),
)
