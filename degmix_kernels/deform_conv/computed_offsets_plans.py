"""Launch plans of DeGMix's operator with its offsets computed inside the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from degmix_kernels import backend, layout
from degmix_kernels.deform_conv import computed_offsets_backward_kernels as backward_kernels
from degmix_kernels.deform_conv import computed_offsets_kernels as kernels
from degmix_kernels.deform_conv import planar
from degmix_kernels.deform_conv.problem import Problem, block
from degmix_kernels.epilogue import Epilogue
from degmix_kernels.launch import Launch, needs_64_bit
from degmix_kernels.product import allows_tf32, precision

# Maps that the offsets are computed from: nine for each half of the channels, each seen through 3×3 weights.
MAPS = 18
WINDOW = (9, 3, 3)
# The 81 taps of an offset in blocks of three maps, and what kernels pad a block to, for aligned loads.
BLOCKS, TAPS, PADDED = 3, 27, 32
# Programs of the samples' gradient that keep a GPU busy; not the GPU's own number of multiprocessors, as sums
# would then differ between GPUs.
SAMPLES_PROGRAMS = 1024


@dataclass(frozen=True)
class Call:
    """The tensors of one call, as kernels take them, and what all of its launches share."""

    x: Tensor  # planar or channels_last; the rest is contiguous
    positions: Tensor
    offset_weight: Tensor  # (2·C, BLOCKS, PADDED)
    constant_offset: Tensor
    weight: Tensor

    @classmethod
    def of(
        cls, x: Tensor, positions: Tensor, offset_weight: Tensor, constant_offset: Tensor, weight: Tensor
    ) -> Call:
        """The call on dense copies of whatever is not dense, with its offset weight padded."""
        taps = offset_weight.reshape(-1, BLOCKS, TAPS)
        return cls(
            layout.dense(x),
            positions.contiguous(),
            functional.pad(taps, (0, PADDED - TAPS)),
            constant_offset.contiguous(),
            weight.contiguous(),
        )

    @property
    def problem(self) -> Problem:
        """The same call with the offsets in memory; here its offset is a view of the constant."""
        offset = self.constant_offset.expand(self.x.shape[0], -1, -1, -1)
        return Problem(self.x, offset, self.weight, None, (1, 1), (0, 0), (1, 1))

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.x.shape[2] * self.x.shape[3]

    def half_steps(self, block_channels: int) -> int:
        """Blocks of channels in a half."""
        return triton.cdiv(self.x.shape[1] // 2, block_channels)

    def arguments(self, block_channels: int) -> dict[str, Any]:
        """Arguments of every kernel."""
        return {
            "input_ptr": self.x,
            "positions_ptr": self.positions,
            "offset_weight_ptr": self.offset_weight,
            "constant_offset_ptr": self.constant_offset,
            "channels": self.x.shape[1],
            "out_channels": self.weight.shape[0],
            "height": self.x.shape[2],
            "width": self.x.shape[3],
            "pixels": self.pixels,
            "half_steps": self.half_steps(block_channels),
            "tap_blocks": BLOCKS,
        }

    def constants(self, output: Tensor) -> dict[str, Any]:
        """Constants of every kernel; ``output`` or its gradient."""
        return {
            "INPUT_LAST": layout.is_channels_last(self.x),
            "OUTPUT_LAST": layout.is_channels_last(output),
            "PRECISION": precision(self.x.dtype),
            "OFFSET_PRECISION": offset_precision(),
            # Kernels add the image's own start, in 64 bits always.
            "INDEX_64": needs_64_bit(self.x[:1], self.constant_offset, output[:1]),
        }


def offset_precision() -> str:
    """How offsets are computed: exact products of halves of operands where matrix units know no fp32.

    Three TF32 products (high·high, high·low, low·high) leave out 2⁻²² of the result, as fp32 does.
    """
    if backend.INTERPRETED:
        return "interpreter"
    return "ieee" if torch.version.hip else "tf32x3"


def gradient_precision(dtype: torch.dtype) -> str:
    """How gradients that arrive at offsets go on: in TF32 if products in ``dtype`` rounded them before."""
    if backend.INTERPRETED:
        return "interpreter"
    rounded = dtype != torch.float32 or allows_tf32()
    return "tf32" if rounded and not torch.version.hip else offset_precision()


def plan_forward(
    call: Call, bias: Tensor | None, output: Tensor, activation: str, pre: Tensor | None
) -> Launch:
    """Plan the forward pass; ``pre`` is filled with the output's value before the activation."""
    wide = call.x.dtype != torch.float32
    # Every block of out channels computes the offsets and gathers again: it is as large as registers allow.
    out = block(call.weight.shape[0], 256 if wide else 128)
    pixels, channels = block(call.pixels, 64 if wide else 32), 16
    out_blocks = triton.cdiv(call.weight.shape[0], out)
    return Launch(
        kernels.forward,
        call.x.shape[0] * triton.cdiv(call.pixels, pixels) * out_blocks,
        {
            **call.arguments(channels),
            "weight_ptr": call.weight,
            "bias_ptr": bias,
            "output_ptr": output,
            "pre_ptr": pre,
            "out_blocks": out_blocks,
        },
        {
            "ACTIVATION": activation,
            **call.constants(output),
            "BLOCK_OUT": out,
            "BLOCK_CHANNELS": channels,
            "BLOCK_PIXELS": pixels,
        },
        num_warps=8 if out * pixels >= 4096 else 4,
    )


def plan_backward_samples(
    call: Call,
    grad: Tensor,
    epilogue: Epilogue,
    grad_input: Tensor | None,
    grad_positions: Tensor | None,
    wants_offset_weight: bool,
    grad_constant: Tensor | None,
    scale: Tensor | None,
) -> tuple[Launch, Tensor | None]:
    """Plan the gradients of all but weight and bias, each None if not wanted.

    Args:
        call: its tensors.
        grad: gradient of the output, planar or channels_last.
        epilogue: what the forward pass ended with.
        grad_input: zeros laid out as x, to be added to: fp32, or int64 with a scale.
        grad_positions: the same for the positions.
        wants_offset_weight: whether to allocate and fill partial sums of the offset weight's gradient.
        grad_constant: to be filled.
        scale: two values, of ``fixed_point_scales``, for the deterministic sums; else None.

    Returns:
        The plan, and the partial sums, (splits, 2·C, BLOCKS, PADDED), or None.
    """
    # The scatter keeps four corners of every sample in registers, exact products their operands: 4 samples
    # per thread fit, 2 with sums of 64 bits, one with fp32.
    wide = call.x.dtype != torch.float32
    channels, pixels = block(call.x.shape[1] // 2, 32 if wide and scale is None else 16), 16
    out = block(call.weight.shape[0], 32)
    blocks, pixel_blocks = 2 * call.half_steps(channels), triton.cdiv(call.pixels, pixels)
    share = triton.cdiv(pixel_blocks, triton.cdiv(SAMPLES_PROGRAMS, blocks))
    splits = triton.cdiv(pixel_blocks, share)
    partial = None
    if wants_offset_weight:
        partial = call.offset_weight.new_empty((splits, *call.offset_weight.shape))
    plan = Launch(
        backward_kernels.backward_samples,
        splits * blocks,
        {
            **call.arguments(channels),
            "grad_ptr": grad,
            "pre_ptr": epilogue.arguments()["pre_ptr"],
            "weight_ptr": call.weight,
            "grad_input_ptr": grad_input,
            "grad_positions_ptr": grad_positions,
            "partial_ptr": partial,
            "grad_constant_ptr": grad_constant,
            "scale_ptr": scale,
            "batch": call.x.shape[0],
            "share": share,
            "steps": share * call.x.shape[0],
            "out_steps": triton.cdiv(call.weight.shape[0], out),
        },
        {
            "ACTIVATION": epilogue.activation,
            "FIXED_POINT": scale is not None,
            **call.constants(grad),
            "GRADIENT_PRECISION": gradient_precision(call.x.dtype),
            "BLOCK_OUT": out,
            "BLOCK_CHANNELS": channels,
            "BLOCK_PIXELS": pixels,
        },
        num_warps=4 if wide else 8,
    )
    return plan, partial


def plan_backward_weight(
    call: Call, grad: Tensor, epilogue: Epilogue, bias: bool
) -> tuple[Launch, Tensor, Tensor | None]:
    """Plan the gradient of the weight and, if wanted, of the bias, and allocate their partial sums.

    Returns:
        The plan, the partial sums of the weight, (splits, Cout, C), and those of the bias, (splits, Cout), or
        None. All zeros without images.
    """
    out_channels = call.weight.shape[0]
    out = block(out_channels, 256 if call.x.dtype != torch.float32 else 128)
    pixels, channels = 16, block(call.x.shape[1] // 2, 32)
    out_blocks, blocks = triton.cdiv(out_channels, out), 2 * call.half_steps(channels)
    splits = call.problem.weight_splits(out_blocks * blocks)
    batch = call.x.shape[0]
    new = call.weight.new_empty if batch > 0 else call.weight.new_zeros
    partial = new((splits, *call.weight.shape[:2]), dtype=torch.float32)
    bias_partial = new((splits, out_channels), dtype=torch.float32) if bias else None
    plan = Launch(
        backward_kernels.backward_weight,
        out_blocks * blocks * splits if batch > 0 else 0,
        {
            **call.arguments(channels),
            "grad_ptr": grad,
            "pre_ptr": epilogue.arguments()["pre_ptr"],
            "partial_ptr": partial,
            "bias_partial_ptr": bias_partial,
            "batch": batch,
            "share": triton.cdiv(batch * triton.cdiv(call.pixels, pixels), splits),
            "out_blocks": out_blocks,
        },
        {
            "ACTIVATION": epilogue.activation,
            **call.constants(grad),
            "BLOCK_OUT": out,
            "BLOCK_CHANNELS": channels,
            "BLOCK_PIXELS": pixels,
        },
        num_warps=8 if out * channels >= 4096 else 4,
    )
    return plan, partial, bias_partial


def fixed_point_scales(call: Call, grad: Tensor, epilogue: Epilogue) -> Tensor:
    """Powers of two at which no deterministic sum can leave 62 bits, (2,): for input and positions.

    An offset's gradient is at most |dz| · Σ_out |weight| · 2 max|x|, the slope between two pixels; a position
    adds that up over the channels of its half, both axes and nine taps. NaN if any of these is not finite:
    all of the gradient is then NaN.
    """
    scale = planar.fixed_point_scale(call.problem, grad, epilogue)
    bound = 1.2 * grad.detach().abs().amax().double()  # no activation is steeper
    bound = bound * call.weight.detach().double().abs().sum(0).amax()
    bound = bound * 2 * call.x.detach().abs().amax().double()
    # Three maps at once: a little more than the sum of any of them.
    taps = call.offset_weight.detach().double().abs().view(2, -1, BLOCKS, PADDED)
    bound = bound * taps.sum((1, 3)).amax()
    exponent = (61 - bound.log2()).floor().clamp(-126, 126)
    return torch.stack([scale, torch.where(bound.isfinite(), exponent.exp2(), torch.nan).float()])


def plan_examples(dtype: torch.dtype) -> list[Launch]:
    """Every kind of launch the op makes, planned on meta tensors: what the compile check compiles."""
    plans = []
    # DeGMix on NYUD-v2 in training; channels_last without activation, deterministic; more than 2³¹ elements.
    cases = [((8, 256, 107, 140), "gelu", False), ((2, 96, 56, 56), "identity", True)]
    if dtype == torch.bfloat16:
        cases.append(((1, 256, 2048, 4096), "gelu", False))
    for (batch, channels, height, width), activation, extras in cases:

        def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        x = empty(batch, channels, height, width, of=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if extras else x
        call = Call(
            x,
            empty(batch, MAPS, height, width),
            empty(2 * channels, BLOCKS, PADDED),
            empty(1, 2 * channels, height, width),
            empty(channels, channels, 1, 1, of=dtype),
        )
        sums = torch.int64 if extras else torch.float32
        scale = empty(2) if extras else None
        pre = None if activation == "identity" else x
        epilogue = Epilogue(activation, pre)
        plans.append(plan_forward(call, empty(channels, of=dtype), x, activation, pre))
        plans.append(plan_backward_weight(call, x, epilogue, True)[0])
        grad_input, grad_positions = x.to(sums), call.positions.to(sums)
        plans.append(
            plan_backward_samples(
                call, x, epilogue, grad_input, grad_positions, True, call.constant_offset, scale
            )[0]
        )
    return plans
