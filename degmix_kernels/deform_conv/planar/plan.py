"""Launch plans of the planar deformable convolution. Nothing here touches memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from degmix_kernels import maps
from degmix_kernels.deform_conv.path import Path
from degmix_kernels.deform_conv.planar import backward_kernels, kernels
from degmix_kernels.deform_conv.planar.blocks import Blocks, Span, fits, layouts, tile, touched, warps
from degmix_kernels.deform_conv.problem import Problem
from degmix_kernels.epilogue import Epilogue
from degmix_kernels.launch import Launch, needs_64_bit
from degmix_kernels.maps import block_of, ceil_div
from degmix_kernels.statistics import Statistics


def plan_forward(
    problem: Problem,
    bias: Tensor | None,
    output: Tensor,
    activation: str = "identity",
    pre: Tensor | None = None,
    statistics: Statistics | None = None,
) -> Launch:
    """Plan ``output = activation(deform_conv2d(...))``.

    Args:
        problem: the call; its tensors dense, planar or channels_last; so its weight, which is faster
            channels_last with several taps.
        bias: (Cout,) or None.
        output: to be filled, planar or channels_last.
        activation: one of ``epilogue.ACTIVATIONS``.
        pre: to be filled with the output's value before the activation, laid out as the output; or None.
        statistics: to be filled, from ``new_statistics``; or None.
    """
    blocks = _forward_blocks(problem, activation != "identity" or statistics is not None)
    span = Span.of(problem, blocks.out)
    sets, within_steps = span.tiles(problem, blocks)
    out_blocks = ceil_div(span.groups * problem.group_out, blocks.out)
    pixel_blocks = ceil_div(problem.out_pixels, blocks.pixels)
    return Launch(
        kernels.forward,
        problem.batch * pixel_blocks * span.count * out_blocks,
        {
            "input_ptr": problem.input,
            "offset_ptr": problem.offset,
            "mask_ptr": problem.mask,
            "weight_ptr": problem.weight,
            "bias_ptr": bias,
            "output_ptr": output,
            "pre_ptr": pre,
            "means_ptr": None if statistics is None else statistics.means,
            "squares_ptr": None if statistics is None else statistics.squares,
            **problem.sizes(),
            "span_groups": span.groups,
            "spans": span.count,
            "out_blocks": out_blocks,
            "within_steps": within_steps,
            "steps": sets * within_steps * problem.taps,
        },
        {
            "ACTIVATION": activation,
            **layouts(problem, output),
            "WEIGHT_LAST": maps.is_channels_last(problem.weight),
            "SPANS": span.groups > 1,
            **blocks.constants(problem),
            "PART": min(16, blocks.pixels),
        },
        num_warps=warps(blocks.out * blocks.pixels, 512),
    )


def _forward_blocks(problem: Problem, more: bool = False) -> Blocks:
    """Block sizes of the forward pass; ``more`` follows the product: an activation, statistics."""
    # Every block of out channels gathers the samples again, so it is as large as registers allow. Exact fp32
    # products keep their operands in registers, too. 256 × 64 sums on 16 warps take 32 registers of a thread,
    # which leaves room for 4 samples, at no more than 128 registers: all warps that an SM has room for. On 8
    # warps they need 170, 255 with an activation, and leave the SM half empty.
    wide = problem.input.dtype != torch.float32
    largest = 256 if wide else 128
    span = Span.of(problem, largest)
    out = block_of(span.groups * problem.group_out, largest)
    # Where it takes registers to tell groups apart, 256 out channels leave room for half as many pixels.
    narrow = out == 256 and problem.groups > 1
    pixels = block_of(problem.out_pixels, 64 if wide and out > 16 and not narrow else 32)
    # 32 rows spill where addresses have 64 bits, or with more to do.
    rows = 32 if out * pixels >= 16384 and not (more or needs_64_bit(problem.offset[:1])) else 16
    rows = block_of(span.channels, rows)
    return Blocks(out, *tile(problem, rows), pixels)


def new_statistics(problem: Problem) -> Statistics:
    """Room for the statistics that ``plan_forward`` gathers."""
    pixels = _forward_blocks(problem).pixels
    shape = (problem.batch * ceil_div(problem.out_pixels, pixels), problem.weight.shape[0])
    parts = (problem.weight.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return Statistics(*parts, pixels)


def plan_backward_samples(
    problem: Problem,
    grad: Tensor,
    grad_input: Tensor | None,
    grad_offset: Tensor | None,
    grad_mask: Tensor | None,
    scale: Tensor | None,
    epilogue: Epilogue | None = None,
) -> Launch:
    """Plan the gradients of input, offset and mask, each None if not wanted.

    Args:
        problem: as for ``plan_forward``.
        grad: gradient of the output, planar or channels_last.
        grad_input: zeros laid out as the input, to be added to: fp32, or int64 with a scale.
        grad_offset: to be filled, laid out as the offset.
        grad_mask: to be filled, laid out as the mask.
        scale: from ``fixed_point_scale``, for the deterministic input gradient; else None.
        epilogue: what the forward pass ended with; None if with nothing.
    """
    epilogue = epilogue or Epilogue()
    # The scatter keeps four corners of every sample alive, in registers: with 4 samples per thread two
    # programs of 8 warps share an SM (128 registers), with 8 samples one does (217), and 16 spill.
    wide = problem.input.dtype != torch.float32
    largest, channels = 64 if wide else 32, problem.group_channels
    # A tile should hold one group only: rows divide its channels, if 16 do.
    rows = block_of(channels if problem.groups == 1 else channels & -channels, largest)
    groups, within = tile(problem, rows)
    while rows > 16 and not fits(problem, _sample_rows(problem, groups, within)):
        rows //= 2
        groups, within = tile(problem, rows)
    # Conv groups that a tile's channels belong to.
    length, step = (groups * problem.offset_channels,) * 2
    if groups == 1:
        length, step = within, math.gcd(problem.offset_channels, within)
    span = min(problem.groups, touched(length, step, problem.group_channels))
    pixels = block_of(problem.out_pixels, min(32, (1024 if wide else 512) // rows))
    blocks = Blocks(block_of(span * problem.group_out, 32), groups, within, pixels)
    sets = ceil_div(problem.offset_groups, groups)
    pixel_blocks = ceil_div(problem.out_pixels, blocks.pixels)
    return Launch(
        backward_kernels.backward_samples,
        problem.batch * pixel_blocks * sets,
        {
            "grad_ptr": grad,
            **epilogue.arguments(),
            "input_ptr": problem.input,
            "offset_ptr": problem.offset,
            "mask_ptr": problem.mask,
            "weight_ptr": problem.weight,
            "grad_input_ptr": grad_input,
            "grad_offset_ptr": grad_offset,
            "grad_mask_ptr": grad_mask,
            "scale_ptr": scale,
            **problem.sizes(),
            "span_groups": span,
            "blocks": sets,
            "within_steps": ceil_div(problem.offset_channels, within),
            "out_steps": ceil_div(span * problem.group_out, blocks.out),
        },
        {
            "ACTIVATION": epilogue.activation,
            "FIXED_POINT": scale is not None,
            **layouts(problem, grad),
            "WEIGHT_LAST": maps.is_channels_last(problem.weight),
            "SPANS": span > 1,
            **blocks.constants(problem),
        },
        num_warps=warps(blocks.rows * blocks.pixels, 128 if wide and span == 1 else 64),
    )


def _sample_rows(problem: Problem, groups: int, within: int) -> int:
    """Rows of all tiles that deal with whole offset groups, or with parts of one."""
    sets, steps = ceil_div(problem.offset_groups, groups), ceil_div(problem.offset_channels, within)
    return sets * steps * groups * within


def plan_backward_weight(
    problem: Problem, grad: Tensor, epilogue: Epilogue | None = None, bias: bool = False
) -> tuple[Launch, Tensor, Tensor | None]:
    """Plan the gradient of the weight and, if wanted, of the bias, and allocate their partial sums.

    Args:
        problem: as for ``plan_forward``.
        grad: gradient of the output, planar or channels_last.
        epilogue: what the forward pass ended with; None if with nothing.
        bias: whether the gradient of the bias is wanted.

    Returns:
        The plan, the weight's partial sums for ``finish_weight``, and the bias's, (splits, Cout), or None;
        all zeros without images.
    """
    epilogue = epilogue or Epilogue()
    # The gradient of the output is read, and the activation's slope computed, for every block of channels
    # again: the more rows the better. 256 × 64 sums on 16 warps leave room for 16 pixels.
    wide = problem.input.dtype != torch.float32
    span = Span.of(problem, 256 if wide else 128)
    out = block_of(span.groups * problem.group_out, 256 if wide else 128)
    narrow = out == 256 and problem.groups > 1  # as in the forward pass
    rows = block_of(span.channels, 64 if wide and not narrow else 32)
    while rows > 16 and not fits(problem, span.rows(problem, rows)):
        rows //= 2
    pixels = block_of(problem.out_pixels, 16 if wide and out * rows >= 4096 else 32)
    blocks = Blocks(out, *tile(problem, rows), pixels)
    sets, within_steps = span.tiles(problem, blocks)
    out_blocks = ceil_div(span.groups * problem.group_out, blocks.out)
    programs = out_blocks * sets * within_steps * problem.taps * span.count
    splits = problem.weight_splits(programs)
    out_channels, group_channels = problem.weight.shape[:2]
    new = problem.weight.new_empty if problem.batch > 0 else problem.weight.new_zeros
    partial = new((splits, problem.taps, out_channels, group_channels), dtype=torch.float32)
    bias_partial = new((splits, out_channels), dtype=torch.float32) if bias else None
    pixel_blocks = ceil_div(problem.out_pixels, blocks.pixels)
    plan = Launch(
        backward_kernels.backward_weight,
        programs * splits if problem.batch > 0 else 0,
        {
            "grad_ptr": grad,
            **epilogue.arguments(),
            "input_ptr": problem.input,
            "offset_ptr": problem.offset,
            "mask_ptr": problem.mask,
            "partial_ptr": partial,
            "bias_partial_ptr": bias_partial,
            "batch": problem.batch,
            "share": ceil_div(problem.batch * pixel_blocks, splits),
            **problem.sizes(),
            "span_groups": span.groups,
            "spans": span.count,
            "out_blocks": out_blocks,
            "within_steps": within_steps,
            "tiles": sets * within_steps,
        },
        {
            "ACTIVATION": epilogue.activation,
            **layouts(problem, grad),
            "SPANS": span.groups > 1,
            **blocks.constants(problem),
        },
        num_warps=warps(blocks.out * blocks.rows, 512),
    )
    return plan, partial, bias_partial


def finish_weight(sums: Tensor, weight: Tensor) -> Tensor:
    """The weight's gradient from its fp32 sums, in the kernels' order."""
    return sums.permute(1, 2, 0).reshape(weight.shape).to(weight.dtype)


PLANAR = Path(False, plan_forward, plan_backward_samples, plan_backward_weight, finish_weight)
