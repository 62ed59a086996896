"""Bugs in the kernels and plans of every family."""

BUGS = r"""
degmix_kernels/batch_norm/kernels.py
  batch_norm: eps is forgotten on the way back
    - deviation = tl.rsqrt(vector(variance_ptr, channel, channel_valid) + eps)
    + deviation = tl.rsqrt(vector(variance_ptr, channel, channel_valid))
    ? test_contract: values_and_gradients and float32 and batch_norm

degmix_kernels/map_kernels.py
  batch_norm: the last pixel is not written
    - valid = row_valid[:, None] & (pixel < pixels)
    + valid = row_valid[:, None] & (pixel < pixels - 1)
    ? test_contract: values_and_gradients and float32 and batch_norm
    ? kernels/test_coordinate_bias: first_middle or non_contiguous

degmix_kernels/batch_norm/plan.py
  batch_norm: x is read where nothing needs it
    - "x_ptr": x if products else None,
    + "x_ptr": x,
    ? kernels/test_batch_norm: only_what_is_wanted

degmix_kernels/maps.py
  batch_norm: wide loads where rows are not aligned
    - return largest_unit(self.channels if self.last else self.pixels)
    + return largest_unit(self.channels)
    ? kernels/test_batch_norm: plans_know

degmix_kernels/batch_norm/running.py
  batch_norm: the running variance is the biased one
    - variances = torch._foreach_mul(variances, count / (count - 1))
    + variances = list(variances)
    ? kernels/test_batch_norm: running_ones

degmix_kernels/channel_mix/kernels.py
  channel_mix: every group reads the first one's channels
    - x_ptr += image * channels * pixels + group * inner * (1 if LAST else pixels)
    + x_ptr += image * channels * pixels + group * inner
    ? test_contract: values_and_gradients and float32 and channel_mix

degmix_kernels/channel_mix/plan.py
  channel_mix: statistics in parts in the input's dtype
    - *(weight.new_empty(shape, dtype=torch.float32) for _ in range(2))
    + *(weight.new_empty(shape) for _ in range(2))
    ? kernels/test_channel_mix: half_precision_keeps

degmix_kernels/linear_norm/kernels.py
  linear_norm: every block's gradient is read from the first one's pixels
    - image = block + image
    + image = image
    ? kernels/test_linear_norm: blocks_are_calls
  linear_norm: a mean on the way back without the norm's weight
    - slope = tl.sum(product * weight, axis=0, keep_dims=True) / channels
    + slope = tl.sum(product, axis=0, keep_dims=True) / channels
    ? test_contract: values_and_gradients and float32 and linear_norm

degmix_kernels/linear_norm/plan.py
  linear_norm: tiles of a last, smaller part are left out
    - parts = ceil_div(tiles, max(steps, 1))
    + parts = tiles // max(steps, 1)
    ? kernels/test_linear_norm: parts_end

degmix_kernels/task_attention/kernels.py
  task_attention: the scores' maximum is not scaled
    - largest = tl.maximum(largest, scores[task] * scale)
    + largest = tl.maximum(largest, scores[task])
    ? kernels/test_task_attention: thousands
  task_attention: a key that is the value loses the value's gradient where heads share it
    - if value_ptr is None:
    -                     grad_keys
    + if (value_ptr is None) and (HEADS > 1):
    +                     grad_keys
    ? test_contract: values_and_gradients and float32 and task_attention

degmix_kernels/task_attention/plan.py
  task_attention: 32-bit addresses, always
    - "INDEX_64": needs_64_bit(*others),
    + "INDEX_64": False,
    ? kernels/test_task_attention: plans_know

degmix_kernels/gating/kernels.py
  gating: padding is part of the variance
    - centred = tl.where(valid, shifted - mean, 0.0)
    -     return mean,
    + centred = shifted - mean
    +     return mean,
    ? kernels/test_gating: ragged_tiles and float32

degmix_kernels/gating/backward_kernels.py
  gating: sums of two images on one row
    - part = element * column_blocks + column_block
    + part = element + column_block
    ? kernels/test_gating: ragged_tiles and bfloat16

degmix_kernels/gating/plan.py
  gating: a launch more, for statistics that no one shares
    - return ceil_div(columns, tiles.columns) > 2
    + return ceil_div(columns, tiles.columns) > 0
    ? kernels/test_gating: test_launches

degmix_kernels/attention/kernels.py
  gated_attention: a query that sees no key
    - maximum = tl.full((BLOCK_QUERIES,), LOWEST, tl.float32)
    + maximum = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    ? kernels/test_attention: minus_infinity

degmix_kernels/attention/backward_kernels.py
  gated_attention: the query's gradient to the base 2
    - store_tokens(grad_query_ptr + offset, grad_query * scale,
    + store_tokens(grad_query_ptr + offset, grad_query * score_scale,
    ? kernels/test_attention: gated_kernels and float32

degmix_kernels/attention/plan.py
  gated_attention: keys are read at the distances of queries
    - steps, unit = strides(**tensors)
    + steps, unit = strides(**tensors | {"key": tensors["query"]})
    ? kernels/test_attention: views_that_share or registered

degmix_kernels/attention/linear_plan.py
  linear_attention: sums in half precision
    - parts = left.new_empty((batch, heads, splits, head_dim, head_dim), dtype=torch.float32)
    + parts = left.new_empty((batch, heads, splits, head_dim, head_dim))
    ? kernels/test_attention: beyond_half

degmix_kernels/coordinate_bias/kernels.py
  coordinate_bias: a table in the map's dtype
    - mask=valid & by_row, other=0.0).to(tl.float32)
    + mask=valid & by_row, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
    ? kernels/test_coordinate_bias: precision

degmix_kernels/deform_conv/sampling.py
  sampling: the first column is off the map
    - left = low_x >= 0
    + left = low_x > 0
    ? kernels/test_deform_conv_paths: values_and_gradients and general
    ? kernels/test_deform_conv_paths: values_and_gradients and 1x1
  sampling: a NaN offset is on the map
    - return low_y, low_x, fraction_y + undefined, fraction_x + undefined
    + return low_y, low_x, fraction_y, fraction_x
    ? kernels/test_deform_conv_paths: special_offsets
    ? kernels/test_deform_conv_paths: undefined or activation_of_nan
  sampling: fixed-point numbers are rounded before they are scaled
    - gradient = (gradient * scale).to(tl.int64)
    + gradient = gradient.to(tl.int64) * scale.to(tl.int64)
    ? kernels/test_deform_conv: deterministic_input

degmix_kernels/deform_conv/general/kernels.py
  general: a second group samples at the first one's offsets
    - offset_group = (group * group_channels + start) // offset_channels
    + offset_group = start // offset_channels
    ? kernels/test_deform_conv_paths: values_and_gradients and general

degmix_kernels/deform_conv/general/backward_kernels.py
  general: the gradient of a NaN offset is 0
    - grad_y = tl.where((low_y < -1) & is_number(offset_y), 0.0, grad_y)
    + grad_y = tl.where(low_y < -1, 0.0, grad_y)
    ? kernels/test_deform_conv_paths: special_offsets

degmix_kernels/deform_conv/problem.py
  deform_conv: shares of the weight's gradient without pixels
    - busy = min(ceil_div(WEIGHT_PROGRAMS, programs), ceil_div(self.batch * self.out_pixels, 32))
    + busy = ceil_div(WEIGHT_PROGRAMS, programs)
    ? kernels/test_deform_conv_memory: every_share

degmix_kernels/deform_conv/general/plan.py
  general: a weight's gradient of the image before
    - "share": ceil_div(problem.batch * ceil_div(problem.out_pixels, block_pixels), splits),
    + "share": problem.batch * ceil_div(problem.out_pixels, block_pixels) // splits,
    ? kernels/test_deform_conv_paths: values_and_gradients and general

degmix_kernels/deform_conv/planar/kernels.py
  planar: the offsets of a tap too late
    - offset_ptr, group, (step + 1) % taps, pixel,
    + offset_ptr, group, step % taps, pixel,
    ? kernels/test_deform_conv_paths: values_and_gradients and (8 or across)

degmix_kernels/deform_conv/planar/backward_kernels.py
  planar: the mask's gradient is masked
    - grad_mask += tl.sum(gradient * value, axis=1, keep_dims=True)
    + grad_mask += tl.sum(gradient * modulation * value, axis=1, keep_dims=True)
    ? kernels/test_deform_conv_paths: values_and_gradients and 1x1
  planar: a tile of several groups stores what lies between them
    - stored = stored & (out // group_out == weight_group[None, :])
    + stored = stored & (out // group_out <= weight_group[None, :])
    ? kernels/test_deform_conv_paths: values_and_gradients and depthwise

degmix_kernels/deform_conv/planar/tiles.py
  planar: a NaN reaches the next group
    - != 0).to(tl.int32), axis=1), axis=0) == 0:
    + != 0).to(tl.int32), axis=1), axis=0) >= 0:
    ? kernels/test_deform_conv_paths: undefined or activation_of_nan

degmix_kernels/deform_conv/path.py
  deform_conv: a gradient is copied once more
    - grad_part = maps.dense(grad[images])
    + grad_part = grad[images].clone()
    ? kernels/test_deform_conv_memory: temporaries

degmix_kernels/deform_conv/op.py
  deform_conv: the result of a channels_last input is contiguous
    - dtype=input.dtype, device=input.device, memory_format=maps.memory_format(input))
    + dtype=input.dtype, device=input.device)
    ? test_contract: channels_last and deform
"""
