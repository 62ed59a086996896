"""The list of bugs, each with the tests that have to notice it.

A bug is one change of text. Who rewrites a line that a bug changes gives the bug its new text: the same
mistake in the new code. Who moves a test gives the bug its new selection.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One bug.

    Attributes:
        name: what is wrong, in a few words.
        file: where, from the root of the repository.
        old: the right text. It occurs exactly once in the file.
        new: the wrong text that replaces it.
        tests: selections of tests, as arguments of pytest. Each of them has to fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[tuple[str, ...], ...]


def select(file: str, wanted: str = "") -> tuple[str, ...]:
    """A file of tests, or those of its tests whose names have the wanted words."""
    return (f"tests/{file}.py", *(("-k", wanted) if wanted else ()))


# Values and gradients of the contract tests, in fp32, by op.
FP32 = "values_and_gradients and float32 and "

SHARED = (
    Mutation(
        "product: one inner element too many",
        "degmix_kernels/product.py",
        "index_valid = index < inner",
        "index_valid = index <= inner",
        (select("test_contract", FP32 + "channel_mix"),),
    ),
    Mutation(
        "product: the weight's gradient of the first image alone",
        "degmix_kernels/product.py",
        "return shares.sum(0, dtype=torch.float32).to(weight.dtype).view_as(weight)",
        "return shares[0].view_as(weight)",
        (select("test_contract", FP32 + "channel_mix"), select("test_contract", FP32 + "linear_norm")),
    ),
    Mutation(
        "epilogue: halves of a tile count the same in a mean",
        "degmix_kernels/epilogue.py",
        "share = count.to(tl.float32) / (BLOCK // 2 + count)",
        "share = 0.5",
        (select("kernels/test_planar", "test_epilogue or far_from_zero"),),
    ),
    Mutation(
        "epilogue: the variance's gradient takes z for act(z)",
        "degmix_kernels/epilogue.py",
        "mask=channel_valid, other=0.0) * value",
        "mask=channel_valid, other=0.0) * z",
        (select("kernels/test_planar", "test_epilogue or far_from_zero"),),
    ),
    Mutation(
        "epilogue: the slope of silu",
        "degmix_kernels/epilogue.py",
        "sigmoid * (1.0 + z * (1.0 - sigmoid))",
        "sigmoid * (1.0 + z * sigmoid)",
        (
            select("kernels/test_planar", "test_epilogue or far_from_zero"),
            select("test_contract", FP32 + "channel_mix"),
        ),
    ),
    Mutation(
        "epilogue: the slope of relu loses a NaN",
        "degmix_kernels/epilogue.py",
        "tl.where(z > 0, 1.0, tl.where(z == z, 0.0, z))",
        "tl.where(z > 0, 1.0, 0.0)",
        (select("kernels/test_planar", "undefined or activation_of_nan"),),
    ),
    Mutation(
        "statistics: an image's last part counts as a whole one",
        "degmix_kernels/statistics.py",
        "count = tl.minimum(pixels - part % blocks * block, block)\n        mean +=",
        "count = tl.minimum(pixels, block)\n        mean +=",
        (select("kernels/test_planar", "chan_formula"),),
    ),
    Mutation(
        "statistics: the means' own spread is left out of the variance",
        "degmix_kernels/statistics.py",
        "tl.where(valid, within + deviation * deviation * count.to(tl.float64), 0.0)",
        "tl.where(valid, within, 0.0)",
        (select("kernels/test_planar", "chan_formula"),),
    ),
    Mutation(
        "statistics: without elements they are not a number",
        "degmix_kernels/statistics.py",
        "if statistics.means.numel() == 0:",
        "if statistics.means.shape[1] == 0:",
        (select("kernels/test_planar", "chan_formula"),),
    ),
    Mutation(
        "launch: only the longest axis decides on 64 bits",
        "degmix_kernels/launch.py",
        "last += (size - 1) * abs(stride)",
        "last = max(last, (size - 1) * abs(stride))",
        (
            select("kernels/test_batch_norm", "plans_know"),
            select("kernels/test_task_attention", "plans_know"),
        ),
    ),
    Mutation(
        "launch: registers are limited on AMD, too",
        "degmix_kernels/launch.py",
        "return torch.version.hip is None and _capability(",
        "return _capability(",
        (select("kernels/test_launch"),),
    ),
    Mutation(
        "backend: a forced backend that cannot run gives way",
        "degmix_kernels/backend.py",
        'if _backend == "triton" and not runnable:',
        'if _backend == "triton" and not runnable and not HAS_TRITON:',
        (select("test_contract", "forced_backend and batch_norm"),),
    ),
    Mutation(
        "autocast: doubles are cast",
        "degmix_kernels/autocast.py",
        "tensor.is_floating_point() and tensor.dtype != torch.float64",
        "tensor.is_floating_point()",
        (select("test_contract", "autocast and (batch_norm or linear_norm)"),),
    ),
    Mutation(
        "autocast: the other half is widened outside of autocast",
        "degmix_kernels/autocast.py",
        "return tensor.float() if other and enabled(tensor.device) else tensor",
        "return tensor.float() if other else tensor",
        (select("kernels/test_deform_conv_arguments"),),
    ),
    Mutation(
        "checks: a bool is an integer",
        "degmix_kernels/checks.py",
        " and not isinstance(value, bool)",
        "",
        (select("kernels/test_deform_conv_arguments"),),
    ),
    Mutation(
        "checks: a shape may be broadcast",
        "degmix_kernels/checks.py",
        "if tuple(value.shape) != shape:",
        "if any(size not in (1, other) for size, other in zip(value.shape, shape, strict=True)):",
        (select("kernels/test_batch_norm", "bad_input"), select("kernels/test_deform_conv_arguments")),
    ),
)

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
        "degmix_kernels/batch_norm/kernels.py",
        "valid = row_valid[:, None] & (pixel < pixels)",
        "valid = row_valid[:, None] & (pixel < pixels - 1)",
        (
            select("test_contract", FP32 + "batch_norm"),
            select("kernels/test_coordinate_bias", "first_middle or non_contiguous"),
        ),
    ),
    Mutation(
        "batch_norm: tiles of a last, smaller share are left out",
        "degmix_kernels/batch_norm/plan.py",
        "return blocks, ceil_div(tiles, max(steps, 1)),",
        "return blocks, tiles // max(steps, 1),",
        (select("kernels/test_batch_norm", "many_parts"),),
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
        "degmix_kernels/batch_norm/plan.py",
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

DEFORM_CONV = (
    Mutation(
        "sampling: the first column is off the map",
        "degmix_kernels/deform_conv/sampling.py",
        "left = low_x >= 0",
        "left = low_x > 0",
        (
            select("kernels/test_general", "values_and_gradients"),
            select("kernels/test_planar", "values_and_gradients and 1x1"),
        ),
    ),
    Mutation(
        "sampling: a NaN offset is on the map",
        "degmix_kernels/deform_conv/sampling.py",
        "return low_y, low_x, fraction_y + undefined, fraction_x + undefined",
        "return low_y, low_x, fraction_y, fraction_x",
        (
            select("kernels/test_general", "special_offsets"),
            select("kernels/test_planar", "undefined or activation_of_nan"),
        ),
    ),
    Mutation(
        "sampling: fixed-point numbers are rounded before they are scaled",
        "degmix_kernels/deform_conv/sampling.py",
        "gradient = (gradient * scale).to(tl.int64)",
        "gradient = gradient.to(tl.int64) * scale.to(tl.int64)",
        (select("kernels/test_general", "fixed_point"), select("kernels/test_planar", "fixed_point")),
    ),
    Mutation(
        "general: the last tap is forgotten",
        "degmix_kernels/deform_conv/general_kernels.py",
        "for tap in range(0, taps):",
        "for tap in range(0, tl.maximum(taps - 1, 1)):",
        (select("kernels/test_general", "values_and_gradients"),),
    ),
    Mutation(
        "general: a second group samples at the first one's offsets",
        "degmix_kernels/deform_conv/general_kernels.py",
        "offset_group = (group * group_channels + start) // offset_channels",
        "offset_group = start // offset_channels",
        (select("kernels/test_general", "values_and_gradients"),),
    ),
    Mutation(
        "general: the gradient of a NaN offset is 0",
        "degmix_kernels/deform_conv/general_backward_kernels.py",
        "grad_y = tl.where((low_y < -1) & is_number(offset_y), 0.0, grad_y)",
        "grad_y = tl.where(low_y < -1, 0.0, grad_y)",
        (select("kernels/test_general", "special_offsets"),),
    ),
    Mutation(
        "general: a gradient is added to the wrong row",
        "degmix_kernels/deform_conv/general_backward_kernels.py",
        "below = address + width * channels",
        "below = address + channels",
        (select("kernels/test_general", "values_and_gradients"),),
    ),
    Mutation(
        "general: the mask's gradient without the diagonal",
        "degmix_kernels/deform_conv/general_backward_kernels.py",
        "grad_mask = sum_value + fraction_y * sum_dy + fraction_x * (sum_dx + fraction_y * sum_dyx)",
        "grad_mask = sum_value + fraction_y * sum_dy + fraction_x * sum_dx",
        (select("kernels/test_general", "values_and_gradients"),),
    ),
    Mutation(
        "general: a weight's gradient of the image before",
        "degmix_kernels/deform_conv/general.py",
        '"share": ceil_div(problem.batch * ceil_div(problem.out_pixels, block_pixels), splits),',
        '"share": problem.batch * ceil_div(problem.out_pixels, block_pixels) // splits,',
        (select("kernels/test_general", "values_and_gradients"),),
    ),
    Mutation(
        "planar: the offsets of a tap too late",
        "degmix_kernels/deform_conv/planar_kernels.py",
        "offset_ptr, group, (step + 1) % taps, pixel,",
        "offset_ptr, group, step % taps, pixel,",
        (select("kernels/test_planar", "values_and_gradients and (8 or across)"),),
    ),
    Mutation(
        "planar: the mask's gradient is masked",
        "degmix_kernels/deform_conv/planar_backward_kernels.py",
        "grad_mask += tl.sum(gradient * value, axis=1, keep_dims=True)",
        "grad_mask += tl.sum(gradient * modulation * value, axis=1, keep_dims=True)",
        (select("kernels/test_planar", "values_and_gradients and 1x1"),),
    ),
    Mutation(
        "planar: all shares of the bias's gradient on one row",
        "degmix_kernels/deform_conv/planar_backward_kernels.py",
        "bias_partial_ptr += split.to(tl.int64) * out_channels",
        "bias_partial_ptr += split.to(tl.int64) * 0",
        (select("kernels/test_planar", "test_epilogue or far_from_zero"),),
    ),
    Mutation(
        "planar: a tile of several groups stores what lies between them",
        "degmix_kernels/deform_conv/planar_backward_kernels.py",
        "stored = stored & (out // group_out == weight_group[None, :])",
        "stored = stored & (out // group_out <= weight_group[None, :])",
        (select("kernels/test_planar", "values_and_gradients and depthwise"),),
    ),
    Mutation(
        "planar: a NaN reaches the next group",
        "degmix_kernels/deform_conv/planar_tiles.py",
        "!= 0).to(tl.int32), axis=1), axis=0) == 0:",
        "!= 0).to(tl.int32), axis=1), axis=0) >= 0:",
        (select("kernels/test_planar", "undefined or activation_of_nan"),),
    ),
    Mutation(
        "planar: the fixed point of small gradients",
        "degmix_kernels/deform_conv/planar.py",
        ".floor().clamp(-126, 126)",
        ".floor().clamp(-126, 40)",
        (
            select("kernels/test_planar", "fixed_point"),
            select("kernels/test_deform_conv", "deterministic_input"),
        ),
    ),
    Mutation(
        "planar: statistics have a part that no program fills",
        "degmix_kernels/deform_conv/planar.py",
        "shape = (problem.batch * ceil_div(problem.out_pixels, pixels), problem.weight.shape[0])",
        "shape = (problem.batch * ceil_div(problem.out_pixels, pixels) + 1, problem.weight.shape[0])",
        (select("kernels/test_planar", "test_epilogue or far_from_zero"),),
    ),
    Mutation(
        "deform_conv: weight's gradient that no one wants",
        "degmix_kernels/deform_conv/execution.py",
        "if wants_weight or (wants_bias and fused):",
        "if wants_weight or wants_bias:",
        (select("kernels/test_deform_conv", "no_work"),),
    ),
    Mutation(
        "deform_conv: the result of a channels_last input is contiguous",
        "degmix_kernels/deform_conv/execution.py",
        "memory_format = torch.channels_last if last else torch.contiguous_format\n    return torch.empty(",
        "memory_format = torch.contiguous_format\n    return torch.empty(",
        (select("test_contract", "channels_last and deform"),),
    ),
    Mutation(
        "deform_conv: a gradient is copied once more",
        "degmix_kernels/deform_conv/execution.py",
        "grad_part = layout.dense(grad[images])",
        "grad_part = grad[images].clone()",
        (select("kernels/test_deform_conv_memory", "temporaries"),),
    ),
    Mutation(
        "deform_conv: a part of the batch takes a quarter of the columns",
        "degmix_kernels/deform_conv/problem.py",
        "PART_SHARE = 1 / 32",
        "PART_SHARE = 1 / 4",
        (select("kernels/test_deform_conv_memory", "temporaries"),),
    ),
    Mutation(
        "deform_conv: shares of the weight's gradient without pixels",
        "degmix_kernels/deform_conv/problem.py",
        "busy = min(ceil_div(WEIGHT_PROGRAMS, programs), ceil_div(self.batch * self.out_pixels, 32))",
        "busy = ceil_div(WEIGHT_PROGRAMS, programs)",
        (select("kernels/test_deform_conv_memory", "every_share"),),
    ),
)

# In files that are about to be written anew.
ENTRANCES = (
    Mutation(
        "second derivatives are not refused",
        "degmix_kernels/registered.py",
        "Refusing.apply if torch.is_grad_enabled() else backward",
        "backward",
        (select("test_contract", "second_derivative and batch_norm"),),
    ),
    Mutation(
        "channel_mix: its statistics have gradients",
        "degmix_kernels/channel_mix/autograd.py",
        "ctx.mark_non_differentiable(pre, mean, variance, count)",
        "ctx.mark_non_differentiable(pre)",
        (select("kernels/test_channel_mix", "statistics_are_those"),),
    ),
    Mutation(
        "linear_norm: compilers are told another dtype",
        "degmix_kernels/linear_norm/autograd.py",
        "(x.new_empty(shape, dtype=torch.float32) if want else x.new_empty(0) for want in wanted[2:5])",
        "(x.new_empty(shape) if want else x.new_empty(0) for want in wanted[2:5])",
        (select("test_contract", "compilers_are_told and linear_norm"),),
    ),
    Mutation(
        "deform_mix: its variance's gradient around 0",
        "degmix_kernels/deform_conv/autograd.py",
        "constant = -linear * mean",
        "constant = 0 * mean",
        (select("kernels/test_deform_conv", "test_statistics or variance_beside"),),
    ),
    Mutation(
        "deform_mix: inference keeps the value before the activation",
        "degmix_kernels/deform_conv/op.py",
        "keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves)",
        "keep = any(tensor.requires_grad for tensor in leaves)",
        (select("kernels/test_deform_conv", "only_a_gradient"),),
    ),
    Mutation(
        "task_attention: all gradients, whoever wants one",
        "degmix_kernels/task_attention/autograd.py",
        "wanted = list(ctx.needs_input_grad[:3])",
        "wanted = [True, True, ctx.needs_input_grad[2]]",
        (select("kernels/test_task_attention", "only_what_is_wanted"),),
    ),
    Mutation(
        "coordinate_bias: columns' gradient along rows",
        "degmix_kernels/coordinate_bias/autograd.py",
        "parts = grad.split([1, size - 2, 1], axis)",
        "parts = grad.split([1, size - 2, 1], axis)[:2] + grad.split([1, size - 2, 1], axis)[:1]",
        (select("kernels/test_coordinate_bias", "first_middle or non_contiguous"),),
    ),
    Mutation(
        "deform_conv2d: a bias of any length",
        "degmix_kernels/deform_conv/op.py",
        'checks.expect_tensor("bias", bias, dims=1)',
        'checks.expect_tensor("bias", bias)',
        (select("kernels/test_deform_conv_arguments"),),
    ),
)

MODEL = (
    Mutation(
        "model: offsets' tables in single precision",
        "degmix/model/mixer.py",
        "*kernels, start = gathered(list(kinds), torch.float64)",
        "*kernels, start = gathered(list(kinds), torch.float32)",
        (select("model/test_rewrites", "constant_offsets"),),
    ),
    Mutation(
        "model: tasks whose norms differ are mixed together",
        "degmix/model/mixer.py",
        "ordinary = len(kinds) == 1 and all(",
        "ordinary = all(",
        (select("model/test_rewrites", "norms_differ"),),
    ),
    Mutation(
        "model: a merged bias without the output projection's",
        "degmix/model/decoder.py",
        "bias = torch.addmv(promote(linear.bias), promote(linear.weight), promote(output.bias))",
        "bias = promote(linear.bias)",
        (select("model/test_rewrites", "pointwise"),),
    ),
    Mutation(
        "model: what is computed again may have changed since",
        "degmix/model/recompute.py",
        "if tensor._version != version:",
        "if tensor._version < version:",
        (select("model/test_recompute", "changed or unnoticed"),),
    ),
    Mutation(
        "checkpoint: random numbers start anew",
        "degmix/checkpoint.py",
        'torch.set_rng_state(state["rng"])',
        "torch.set_rng_state(torch.get_rng_state())",
        (select("train/test_checkpoint", "random_numbers"),),
    ),
)

BENCH = (
    Mutation(
        "bench: the faster of memory and products bounds",
        "bench/ceilings.py",
        "return max(work.bytes / ceilings.copy,",
        "return min(work.bytes / ceilings.copy,",
        (select("bench/test_ceilings", "slower"),),
    ),
    Mutation(
        "bench: gradients that are passed on are written",
        "degmix_kernels/contract.py",
        "new = (name for name in self.differentiable if name not in self.cost.passed_on)",
        "new = self.differentiable",
        (select("bench/test_costs", "not declared_shape"),),
    ),
    Mutation(
        "bench: only the result is compared before it is timed",
        "bench/check.py",
        "errors = self.errors(run, gradients)",
        "errors = self.errors(run, False)",
        (select("bench/test_check", "every_gradient"),),
    ),
)

MUTATIONS = (
    *SHARED, *BATCH_NORM, *CHANNEL_MIX, *LINEAR_NORM, *TASK_ATTENTION, *GATING, *ATTENTION, *COORDINATE_BIAS,
    *DEFORM_CONV, *ENTRANCES, *MODEL, *BENCH,
)  # fmt: skip
