"""Bugs in the deformable convolution: both paths, forward, backward, memory."""

from __future__ import annotations

from tests.mutations.mutation import Mutation, select

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
        (select("kernels/test_planar", "fixed_point"),),
    ),
    Mutation(
        "general: the last tap is forgotten",
        "degmix_kernels/deform_conv/general/kernels.py",
        "for tap in range(0, taps):",
        "for tap in range(0, tl.maximum(taps - 1, 1)):",
        (select("kernels/test_general", "values_and_gradients"),),
    ),
    Mutation(
        "general: a second group samples at the first one's offsets",
        "degmix_kernels/deform_conv/general/kernels.py",
        "offset_group = (group * group_channels + start) // offset_channels",
        "offset_group = start // offset_channels",
        (select("kernels/test_general", "values_and_gradients"),),
    ),
    Mutation(
        "general: the gradient of a NaN offset is 0",
        "degmix_kernels/deform_conv/general/backward_kernels.py",
        "grad_y = tl.where((low_y < -1) & is_number(offset_y), 0.0, grad_y)",
        "grad_y = tl.where(low_y < -1, 0.0, grad_y)",
        (select("kernels/test_general", "special_offsets"),),
    ),
    Mutation(
        "general: a corner's gradient has its neighbour's weight",
        "degmix_kernels/deform_conv/general/backward_kernels.py",
        "scatter(grad_input_ptr, below, weight_10[:, None] * gradient,",
        "scatter(grad_input_ptr, below, weight_11[:, None] * gradient,",
        (select("kernels/test_general", "values_and_gradients"),),
    ),
    Mutation(
        "general: the mask's gradient without the diagonal",
        "degmix_kernels/deform_conv/general/backward_kernels.py",
        "grad_mask = sum_value + fraction_y * sum_dy + fraction_x * (sum_dx + fraction_y * sum_dyx)",
        "grad_mask = sum_value + fraction_y * sum_dy + fraction_x * sum_dx",
        (select("kernels/test_general", "values_and_gradients"),),
    ),
    Mutation(
        "general: a weight's gradient of the image before",
        "degmix_kernels/deform_conv/general/plan.py",
        '"share": ceil_div(problem.batch * ceil_div(problem.out_pixels, block_pixels), splits),',
        '"share": problem.batch * ceil_div(problem.out_pixels, block_pixels) // splits,',
        (select("kernels/test_general", "values_and_gradients"),),
    ),
    Mutation(
        "planar: the offsets of a tap too late",
        "degmix_kernels/deform_conv/planar/kernels.py",
        "offset_ptr, group, (step + 1) % taps, pixel,",
        "offset_ptr, group, step % taps, pixel,",
        (select("kernels/test_planar", "values_and_gradients and (8 or across)"),),
    ),
    Mutation(
        "planar: the mask's gradient is masked",
        "degmix_kernels/deform_conv/planar/backward_kernels.py",
        "grad_mask += tl.sum(gradient * value, axis=1, keep_dims=True)",
        "grad_mask += tl.sum(gradient * modulation * value, axis=1, keep_dims=True)",
        (select("kernels/test_planar", "values_and_gradients and 1x1"),),
    ),
    Mutation(
        "planar: all shares of the bias's gradient on one row",
        "degmix_kernels/deform_conv/planar/backward_kernels.py",
        "bias_partial_ptr += split.to(tl.int64) * out_channels",
        "bias_partial_ptr += split.to(tl.int64) * 0",
        (select("kernels/test_planar", "test_epilogue or far_from_zero"),),
    ),
    Mutation(
        "planar: a tile of several groups stores what lies between them",
        "degmix_kernels/deform_conv/planar/backward_kernels.py",
        "stored = stored & (out // group_out == weight_group[None, :])",
        "stored = stored & (out // group_out <= weight_group[None, :])",
        (select("kernels/test_planar", "values_and_gradients and depthwise"),),
    ),
    Mutation(
        "planar: a NaN reaches the next group",
        "degmix_kernels/deform_conv/planar/tiles.py",
        "!= 0).to(tl.int32), axis=1), axis=0) == 0:",
        "!= 0).to(tl.int32), axis=1), axis=0) >= 0:",
        (select("kernels/test_planar", "undefined or activation_of_nan"),),
    ),
    Mutation(
        "planar: the fixed point of small gradients",
        "degmix_kernels/deform_conv/path.py",
        ".floor().clamp(-126, 126)",
        ".floor().clamp(-126, 40)",
        (
            select("kernels/test_planar", "fixed_point"),
            select("kernels/test_deform_conv", "deterministic_input"),
        ),
    ),
    Mutation(
        "planar: statistics have a part that no program fills",
        "degmix_kernels/deform_conv/planar/plan.py",
        "shape = (problem.batch * ceil_div(problem.out_pixels, pixels), problem.weight.shape[0])",
        "shape = (problem.batch * ceil_div(problem.out_pixels, pixels) + 1, problem.weight.shape[0])",
        (select("kernels/test_planar", "test_epilogue or far_from_zero"),),
    ),
    Mutation(
        "deform_conv: weight's gradient that no one wants",
        "degmix_kernels/deform_conv/path.py",
        "if wants_weight or (wants_bias and fused):",
        "if wants_weight or wants_bias:",
        (select("kernels/test_deform_conv", "no_work"),),
    ),
    Mutation(
        "deform_conv: the result of a channels_last input is contiguous",
        "degmix_kernels/deform_conv/op.py",
        "dtype=input.dtype, device=input.device, memory_format=maps.memory_format(input))",
        "dtype=input.dtype, device=input.device)",
        (select("test_contract", "channels_last and deform"),),
    ),
    Mutation(
        "deform_conv: a gradient is copied once more",
        "degmix_kernels/deform_conv/path.py",
        "grad_part = maps.dense(grad[images])",
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
