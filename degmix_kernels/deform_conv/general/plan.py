"""Launch plans of the general deformable convolution. Nothing here touches memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from degmix_kernels import maps
from degmix_kernels.deform_conv.general import backward_kernels, kernels
from degmix_kernels.deform_conv.path import Path
from degmix_kernels.deform_conv.problem import Problem
from degmix_kernels.launch import Launch, needs_64_bit
from degmix_kernels.maps import block_of, ceil_div
from degmix_kernels.product import precision

# Programs below which a launch leaves parts of a large GPU idle, so that smaller tiles pay.
BUSY_PROGRAMS = 128


def suits(problem: Problem) -> bool:
    """Whether enough neighbouring channels share offsets and weights for this path."""
    return problem.segment >= 16


def _block_channels(segment: int, largest: int) -> int:
    """Channels of a tile: ``largest``, or half of that where the last block would stay mostly empty."""
    return block_of(segment, largest if segment % largest == 0 or segment >= 4 * largest else largest // 2)


def _pointers(problem: Problem) -> dict[str, Any]:
    return {
        "input_ptr": problem.input,
        "offset_ptr": problem.offset,
        "mask_ptr": problem.mask,
        "weight_ptr": problem.weight,
    }


def _layouts(problem: Problem, output: Tensor) -> dict[str, bool]:
    """How the kernels address this call; ``output`` is the output or its gradient."""
    tensors = (problem.input, problem.offset, problem.mask, output)
    return {
        "OFFSET_LAST": maps.is_channels_last(problem.offset),
        "MASK_LAST": problem.mask is not None and maps.is_channels_last(problem.mask),
        "OUTPUT_LAST": maps.is_channels_last(output),
        "PRECISION": precision(problem.input.dtype),
        # Kernels add the image's own start, in 64 bits always.
        "INDEX_64": needs_64_bit(*(None if tensor is None else tensor[:1] for tensor in tensors)),
    }


def plan_forward(problem: Problem, bias: Tensor | None, output: Tensor) -> Launch:
    """Plan the forward kernel; tensors as it wants them, see ``kernels.forward``."""
    sizes = problem.sizes()
    # Every block of out channels gathers the samples again, so it is as large as registers allow: 64 sums a
    # thread for the matrix units, 32 where fp32 products keep their operands in registers, too.
    wide = problem.input.dtype != torch.float32
    block_out = block_of(problem.group_out, 256 if wide else 128)
    block_pixels = block_of(problem.out_pixels, 64 if wide else 32)
    block_channels = _block_channels(problem.segment, 32)
    images = problem.batch * problem.groups

    def programs() -> int:
        pixel_blocks = ceil_div(problem.out_pixels, block_pixels)
        return images * pixel_blocks * ceil_div(problem.group_out, block_out)

    while programs() < BUSY_PROGRAMS and block_out > 32:  # small maps: gathering again beats idling
        block_out //= 2
    layouts = _layouts(problem, output)
    num_warps = 8 if block_out * block_pixels >= (8192 if wide else 4096) else 4
    return Launch(
        kernels.forward,
        programs(),
        {
            **_pointers(problem),
            "bias_ptr": bias,
            "output_ptr": output,
            "segment": problem.segment,
            "segments": problem.group_channels // problem.segment,
            **sizes,
        },
        {
            **layouts,
            "BLOCK_OUT": block_out,
            "BLOCK_CHANNELS": block_channels,
            "BLOCK_PIXELS": block_pixels,
        },
        num_warps=num_warps,
        # 0.69 ms instead of 0.96 on an H100 (bf16, 256 channels, 100×152, mask, σ = 1): two programs fit.
        hopper_registers=128 if wide and num_warps == 8 and not layouts["INDEX_64"] else None,
    )


def plan_backward_samples(
    problem: Problem,
    grad: Tensor,
    grad_input: Tensor | None,
    grad_offset: Tensor | None,
    grad_mask: Tensor | None,
    scale: Tensor | None,
) -> Launch:
    """Plan the gradients of input, offset and mask; see ``backward_kernels``."""
    sizes = problem.sizes()
    wide = problem.input.dtype != torch.float32
    # The scatter keeps four corners of every sample alive, in registers. With 16 channels, 4 samples a
    # thread, two programs or more fit a multiprocessor and hide each other's latencies; 32 spill on sm_100.
    # In fp32 a thread has 4 samples, too, or 8; on these sides neither Triton 3.6 nor 3.9 spills.
    if wide:
        pixels, block_channels, warps = 64, 16, 8
    elif scale is None and _block_channels(problem.segment, 32) == 32:
        pixels, block_channels, warps = 16, 32, 4
    else:
        pixels, block_channels, warps = 32, 16, 2 if scale is None else 4
    block_pixels = block_of(problem.out_pixels, pixels)
    held = problem.groups == 1 and problem.group_out <= 256 and wide
    if held:
        largest = 256
    else:  # what the registers of the scatter leave room for
        largest = 16 if not wide else 32 if scale is None else 128
    block_out = block_of(problem.group_out, largest)
    return Launch(
        backward_kernels.backward_samples,
        problem.batch * problem.offset_groups * ceil_div(problem.out_pixels, block_pixels),
        {
            "grad_output_ptr": grad,
            **_pointers(problem),
            "grad_input_ptr": grad_input,
            "grad_offset_ptr": grad_offset,
            "grad_mask_ptr": grad_mask,
            "scale_ptr": scale,
            "segment": problem.segment,
            "segments": problem.offset_channels // problem.segment,
            **sizes,
        },
        {
            **_layouts(problem, grad),
            "FIXED_POINT": scale is not None,
            "HELD": held,
            "BLOCK_OUT": block_out,
            "BLOCK_CHANNELS": block_channels,
            "BLOCK_PIXELS": block_pixels,
        },
        num_warps=warps,
    )


def plan_backward_weight(problem: Problem, grad: Tensor) -> tuple[Launch, Tensor]:
    """Plan the weight gradient and allocate its partial sums; see ``backward_kernels``."""
    sizes = problem.sizes()
    wide = problem.input.dtype != torch.float32
    block_out = block_of(problem.group_out, 256 if wide else 128)
    block_channels = _block_channels(problem.segment, 64 if wide else 32)
    block_pixels = block_of(problem.out_pixels, 32 if wide else 16)
    programs = (
        ceil_div(problem.group_out, block_out)
        * problem.taps
        * ceil_div(problem.segment, block_channels)
        * (problem.channels // problem.segment)
    )
    splits = problem.weight_splits(programs)
    new = problem.weight.new_empty if problem.batch > 0 else problem.weight.new_zeros
    partial = new((splits, problem.weight.numel()), dtype=torch.float32)
    plan = Launch(
        backward_kernels.backward_weight,
        programs * splits if problem.batch > 0 else 0,
        {
            "grad_output_ptr": grad,
            **{name: value for name, value in _pointers(problem).items() if name != "weight_ptr"},
            "partial_ptr": partial,
            "batch": problem.batch,
            "share": ceil_div(problem.batch * ceil_div(problem.out_pixels, block_pixels), splits),
            "segment": problem.segment,
            **sizes,
        },
        {
            **_layouts(problem, grad),
            "BLOCK_OUT": block_out,
            "BLOCK_CHANNELS": block_channels,
            "BLOCK_PIXELS": block_pixels,
        },
        num_warps=8 if wide and block_out * block_channels >= 4096 else 4,
    )
    return plan, partial


def finish_weight(sums: Tensor, weight: Tensor) -> Tensor:
    """The weight's gradient from its fp32 sums, in the kernels' order."""
    out_channels, group_channels, height, width = weight.shape
    return sums.view(out_channels, height, width, group_channels).permute(0, 3, 1, 2).to(weight.dtype)


GENERAL = Path(True, plan_forward, plan_backward_samples, plan_backward_weight, finish_weight)
