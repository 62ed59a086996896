"""The per-channel 1×1 deformable convolution on Triton: launch plans, allocation, the registered op."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from degmix_kernels import backend, layout
from degmix_kernels.deform_conv import kernels
from degmix_kernels.launch import Launch, needs_64_bit, run
from degmix_kernels.registered import RegisteredOp

# Programs of the weight gradient that keep a GPU busy. Not the GPU's own number of multiprocessors: sums
# would then differ between GPUs.
WEIGHT_PROGRAMS = 512
# Its partial sums take at most this part of the column buffer they replace (or one set of them).
WEIGHT_PARTIALS = 1 / 20

Geometry = tuple[int, int, int, int]  # stride and padding, vertical then horizontal each


def _block(size: int, largest: int) -> int:
    """Block size along an axis: a power of two from 16, the least a matrix product takes, to ``largest``."""
    return max(16, min(largest, triton.next_power_of_2(size)))


def _precision(dtype: torch.dtype) -> str:
    """How matrix products treat their operands, see ``kernels.multiply``; PyTorch's flag allows TF32."""
    if backend.INTERPRETED:
        return "interpreter"
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _shape_arguments(input: Tensor, offset: Tensor, weight: Tensor, geometry: Geometry) -> dict[str, int]:
    """The run-time sizes all three kernels take."""
    groups = input.shape[1] // weight.shape[1]
    names = ("stride_y", "stride_x", "padding_y", "padding_x")
    return {
        "groups": groups,
        "group_channels": weight.shape[1],
        "group_out": weight.shape[0] // groups,
        "height": input.shape[2],
        "width": input.shape[3],
        "out_width": offset.shape[3],
        "out_pixels": offset.shape[2] * offset.shape[3],
        **dict(zip(names, geometry, strict=True)),
    }


def plan_forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    output: Tensor,
    geometry: Geometry,
) -> Launch:
    """Plan the forward kernel; tensors as it wants them, see ``kernels.forward``."""
    sizes = _shape_arguments(input, offset, weight, geometry)
    # Every block of out channels gathers the samples again, so it is as large as registers allow. Exact fp32
    # products keep their operands in registers, too.
    wide = input.dtype != torch.float32
    block_out = _block(sizes["group_out"], 256 if wide else 128)
    block_pixels = _block(sizes["out_pixels"], 64 if wide else 32)
    block_channels = _block(sizes["group_channels"], 16)  # 32 spill under Triton 3.6 on sm_80
    out_blocks = triton.cdiv(sizes["group_out"], block_out)
    pixel_blocks = triton.cdiv(sizes["out_pixels"], block_pixels)
    return Launch(
        kernels.forward,
        input.shape[0] * sizes["groups"] * pixel_blocks * out_blocks,
        {
            "input_ptr": input,
            "offset_ptr": offset,
            "mask_ptr": mask,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "output_ptr": output,
            **sizes,
        },
        {
            "CHANNELS_LAST": layout.is_channels_last(output),
            "PRECISION": _precision(input.dtype),
            "INDEX_64": needs_64_bit(input, offset, mask, output),
            "BLOCK_OUT": block_out,
            "BLOCK_CHANNELS": block_channels,
            "BLOCK_PIXELS": block_pixels,
        },
        num_warps=8 if block_out * block_pixels >= 4096 else 4,
    )


def plan_backward_samples(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    grad_input: Tensor | None,
    grad_offset: Tensor | None,
    grad_mask: Tensor | None,
    scale: Tensor | None,
    geometry: Geometry,
) -> Launch:
    """Plan the gradients of input, offset and mask; see ``kernels.backward_samples``."""
    sizes = _shape_arguments(input, offset, weight, geometry)
    # The scatter keeps four corners of every sample alive, in registers: 8 samples per thread fit, 16 spill.
    block_out = _block(sizes["group_out"], 32)
    block_pixels = _block(sizes["out_pixels"], 32)
    block_channels = _block(sizes["group_channels"], 64 if input.dtype != torch.float32 else 32)
    channel_blocks = triton.cdiv(sizes["group_channels"], block_channels)
    pixel_blocks = triton.cdiv(sizes["out_pixels"], block_pixels)
    return Launch(
        kernels.backward_samples,
        input.shape[0] * sizes["groups"] * pixel_blocks * channel_blocks,
        {
            "grad_output_ptr": grad,
            "input_ptr": input,
            "offset_ptr": offset,
            "mask_ptr": mask,
            "weight_ptr": weight,
            "grad_input_ptr": grad_input,
            "grad_offset_ptr": grad_offset,
            "grad_mask_ptr": grad_mask,
            "scale_ptr": scale,
            **sizes,
        },
        {
            "CHANNELS_LAST": layout.is_channels_last(grad),
            "FIXED_POINT": scale is not None,
            "PRECISION": _precision(input.dtype),
            "INDEX_64": needs_64_bit(input, offset, mask, grad),
            "BLOCK_OUT": block_out,
            "BLOCK_CHANNELS": block_channels,
            "BLOCK_PIXELS": block_pixels,
        },
        num_warps=8 if block_channels * block_pixels >= 2048 else 4,
    )


def weight_splits(batch: int, out_channels: int, pixels: int, programs: int) -> int:
    """Into how many shares of the pixels the weight gradient is split.

    Args:
        batch: images.
        out_channels: output channels.
        pixels: output pixels of one image.
        programs: programs per share.
    """
    busy = triton.cdiv(WEIGHT_PROGRAMS, programs)
    # Column buffer: batch · channels · pixels; one set of sums: out_channels · channels (fewer with groups).
    small = int(WEIGHT_PARTIALS * batch * pixels / out_channels)
    return max(1, min(busy, small))


def plan_backward_weight(
    grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, geometry: Geometry
) -> tuple[Launch, Tensor]:
    """Plan the weight gradient and allocate its partial sums; see ``kernels.backward_weight``."""
    sizes = _shape_arguments(input, offset, weight, geometry)
    block_out = _block(sizes["group_out"], 256 if input.dtype != torch.float32 else 128)
    block_channels = _block(sizes["group_channels"], 32)
    block_pixels = _block(sizes["out_pixels"], 32)
    programs = (
        triton.cdiv(sizes["group_out"], block_out)
        * triton.cdiv(sizes["group_channels"], block_channels)
        * sizes["groups"]
    )
    splits = weight_splits(input.shape[0], weight.shape[0], sizes["out_pixels"], programs)
    partial = weight.new_empty((splits, *weight.shape), dtype=torch.float32)
    plan = Launch(
        kernels.backward_weight,
        programs * splits,
        {
            "grad_output_ptr": grad,
            "input_ptr": input,
            "offset_ptr": offset,
            "mask_ptr": mask,
            "partial_ptr": partial,
            "batch": input.shape[0],
            "share": triton.cdiv(input.shape[0] * triton.cdiv(sizes["out_pixels"], block_pixels), splits),
            **sizes,
        },
        {
            "CHANNELS_LAST": layout.is_channels_last(grad),
            "PRECISION": _precision(input.dtype),
            "INDEX_64": needs_64_bit(input, offset, mask, grad),
            "BLOCK_OUT": block_out,
            "BLOCK_CHANNELS": block_channels,
            "BLOCK_PIXELS": block_pixels,
        },
        num_warps=8 if block_out * block_channels >= 4096 else 4,
    )
    return plan, partial


def fixed_point_scale(grad: Tensor, weight: Tensor, mask: Tensor | None, groups: int) -> Tensor:
    """The power of two at which no sum of the deterministic input gradient can leave 62 bits.

    The gradient of a sample is at most max|grad| · max over channels of Σ|weight| · max|mask|, and every
    output pixel adds at most that much, once, to an input pixel. NaN if any of these is not finite: all of
    the input gradient is then NaN.
    """
    per_channel = weight.detach().double().abs().view(groups, -1, weight[0].numel()).sum(1).amax()
    bound = grad.abs().amax().double() * per_channel * (grad.shape[2] * grad.shape[3])
    if mask is not None:
        bound = bound * mask.detach().abs().amax().double()
    exponent = (61 - bound.log2()).floor().clamp(-126, 126)
    return torch.where(bound.isfinite(), exponent.exp2(), torch.nan).float()


def _out_format(input: Tensor) -> torch.memory_format:
    return torch.channels_last if layout.is_channels_last(input) else torch.contiguous_format


def _fake_forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride_y: int,
    stride_x: int,
    padding_y: int,
    padding_x: int,
) -> Tensor:
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_out_format(input))


def _forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride_y: int,
    stride_x: int,
    padding_y: int,
    padding_x: int,
) -> Tensor:
    geometry = (stride_y, stride_x, padding_y, padding_x)
    output = _fake_forward(input, offset, weight, bias, mask, *geometry)
    input, offset, weight, bias, mask = _contiguous(input, offset, weight, bias, mask)
    run(plan_forward(input, offset, weight, bias, mask, output, geometry), input.device)
    return output


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, bias, mask, *geometry = inputs
    ctx.save_for_backward(input, offset, weight, mask)
    ctx.geometry = geometry
    ctx.has_bias = bias is not None
    # The user may have left the region that asked for it by the time the backward pass runs.
    ctx.deterministic = torch.are_deterministic_algorithms_enabled()


def _fake_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride_y: int,
    stride_x: int,
    padding_y: int,
    padding_x: int,
    wanted: list[bool],
    deterministic: bool,
) -> list[Tensor]:
    shapes = (
        input.shape,
        offset.shape,
        weight.shape,
        weight.shape[:1],
        offset.shape if mask is None else mask.shape,
    )
    dtypes = (input.dtype, offset.dtype, input.dtype, input.dtype, input.dtype)
    return [
        input.new_empty(shape if want else (0,), dtype=dtype)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    ]


def _backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride_y: int,
    stride_x: int,
    padding_y: int,
    padding_x: int,
    wanted: list[bool],
    deterministic: bool,
) -> list[Tensor]:
    """Gradients of input, offset, weight, bias and mask, an empty tensor for each that is not wanted."""
    geometry = (stride_y, stride_x, padding_y, padding_x)
    if not layout.is_channels_last(grad):
        grad = grad.contiguous()
    input, offset, weight, mask = _contiguous(input, offset, weight, mask)
    results = _fake_backward(grad, input, offset, weight, mask, *geometry, wanted, deterministic)
    grad_input, grad_offset, _, _, grad_mask = (
        result if want else None for result, want in zip(results, wanted, strict=True)
    )
    wants_input, wants_offset, wants_weight, wants_bias, wants_mask = wanted

    if (wants_input or wants_offset or wants_mask) and grad.numel() > 0:
        scale = None
        if wants_input and deterministic:
            scale = fixed_point_scale(grad, weight, mask, input.shape[1] // weight.shape[1])
            grad_input = torch.zeros_like(input, dtype=torch.int64)
        elif wants_input:
            grad_input = torch.zeros_like(input, dtype=torch.float32)
        plan = plan_backward_samples(
            grad, input, offset, weight, mask, grad_input, grad_offset, grad_mask, scale, geometry
        )
        run(plan, grad.device)
        if scale is not None:
            grad_input = grad_input.double() / scale
        if wants_input:
            results[0] = grad_input.to(input.dtype)
    if wants_weight:
        plan, partial = plan_backward_weight(grad, input, offset, weight, mask, geometry)
        run(plan, grad.device)
        results[2] = partial.sum(0).to(weight.dtype)
    if wants_bias:
        results[3] = grad.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype)
    return results


def _differentiate(ctx: Any, backward: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:5])
    gradients = backward(grad, input, offset, weight, mask, *ctx.geometry, wanted, ctx.deterministic)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None, None, None


# per_channel_op(input, offset, weight, bias, mask, stride_y, stride_x, padding_y, padding_x) -> output
per_channel_op = RegisteredOp(
    "degmix::deform_conv2d_per_channel",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    _fake_backward,
    _differentiate,
)


def plan_examples(dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch the op makes, planned on meta tensors: what the compile check compiles."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    # DeGMix on NYUD-v2 at every dtype; a modulated, grouped, channels_last call with offsets as narrow as its
    # input; tensors of more than 2³¹ elements.
    cases = [(8, 256, 1, 107, 140, False, torch.float32)]
    if dtype == torch.bfloat16:
        cases.append((2, 256, 1, 2048, 4096, False, torch.float32))
    else:
        cases.append((2, 96, 2, 56, 56, True, dtype))
    geometry = (1, 1, 0, 0)
    plans = []
    for batch, channels, groups, height, width, extras, offset_dtype in cases:
        input, grad = empty(batch, channels, height, width), empty(batch, channels, height, width)
        offset = empty(batch, 2 * channels, height, width, of=offset_dtype)
        weight, bias, mask, sums = empty(channels, channels // groups), None, None, input.float()
        if extras:
            bias, mask = empty(channels), empty(batch, channels, height, width)
            grad = grad.contiguous(memory_format=torch.channels_last)
        plans.append(plan_forward(input, offset, weight, bias, mask, grad, geometry))
        plans.append(plan_backward_weight(grad, input, offset, weight, mask, geometry)[0])
        plans.append(
            plan_backward_samples(grad, input, offset, weight, mask, sums, offset, mask, None, geometry)
        )
    # The deterministic input gradient.
    integers, scale = sums.long(), empty(of=torch.float32)
    plans.append(
        plan_backward_samples(grad, input, offset, weight, mask, integers, offset, mask, scale, geometry)
    )
    return plans
