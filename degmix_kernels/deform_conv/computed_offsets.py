"""DeGMix's operator with its offsets computed inside the kernels: public function, op, launch plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from degmix_kernels import autocast, backend, checks, layout
from degmix_kernels.activation import ACTIVATIONS
from degmix_kernels.deform_conv import computed_offsets_kernels as kernels
from degmix_kernels.deform_conv import planar, reference
from degmix_kernels.deform_conv.problem import Problem, block, precision
from degmix_kernels.epilogue import Epilogue
from degmix_kernels.launch import Launch, needs_64_bit, run
from degmix_kernels.registered import RegisteredOp

# Maps that the offsets are computed from: nine for each half of the channels, each seen through 3×3 weights.
MAPS = 18
WINDOW = (9, 3, 3)
# The 81 taps of an offset in blocks of three maps, and what kernels pad a block to, for aligned loads.
BLOCKS, TAPS, PADDED = 3, 27, 32
# Programs of the samples' gradient that keep a GPU busy; not the GPU's own number of multiprocessors, as sums
# would then differ between GPUs.
SAMPLES_PROGRAMS = 1024


def deform_mix_computed_offsets(
    x: Tensor,
    positions: Tensor,
    offset_weight: Tensor,
    constant_offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """:func:`degmix_kernels.deform_mix` with offsets that are computed where they are used, and never stored.

    ``offsets = conv2d(positions, offset_weight, padding=1, groups=2) + constant_offset``, then
    ``activation(W · sample(x, offsets) + b)``. Whatever the offsets of all images have in common belongs into
    ``constant_offset``, above all large values (pixel coordinates): it is added last, in fp32. Offsets are
    computed in fp32 precision, whatever the dtype of ``x``. The backward pass computes them again.

    Under autocast ``x``, ``weight`` and ``bias`` are cast to the autocast dtype and the result has it; the
    rest keeps its dtype. Doubles are left alone. Layout and special values are those of ``deform_mix``.

    Args:
        x: (N, C, H, W), floating point, C even. channels_last in, channels_last out.
        positions: (N, 18, H, W), fp32 (fp64 with a double ``x``): nine maps for the first half of the
            channels of ``x``, nine for the second.
        offset_weight: (2·C, 9, 3, 3), as ``positions``; row 2i makes dy of channel i, row 2i + 1 its dx.
        constant_offset: (1, 2·C, H, W) in pixels, as ``positions``.
        weight: (Cout, C, 1, 1), as ``x``.
        bias: (Cout,), as ``x``.
        activation: ``"gelu"`` (exact), ``"relu"``, ``"silu"`` or ``"identity"``.

    Returns:
        (N, Cout, H, W), in the dtype of ``x``.

    Raises:
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows DeGMix, arXiv 2308.05721, the spatial-aware deformable operator.
    """
    checks.expect_choice("activation", activation, tuple(ACTIVATIONS))
    given = {"x": x, "positions": positions, "offset_weight": offset_weight}
    for name, value in {**given, "constant_offset": constant_offset, "weight": weight}.items():
        checks.expect_tensor(name, value, dims=4)
    if bias is not None:
        checks.expect_tensor("bias", bias, dims=1)
    x, weight, bias = autocast.cast_inputs(x.device, x, weight, bias)
    _check_arguments(x, positions, offset_weight, constant_offset, weight, bias)
    if backend.runs_triton("deform_mix_computed_offsets", x.device, x.dtype):
        call = (x, positions, offset_weight, constant_offset, weight, bias, activation)
        return computed_offsets_op(*call)[0]
    output = reference_computed_offsets(
        x, positions, offset_weight, constant_offset, weight, bias, activation
    )
    if layout.is_channels_last(x):
        output = output.contiguous(memory_format=torch.channels_last)
    return output


def reference_computed_offsets(
    x: Tensor,
    positions: Tensor,
    offset_weight: Tensor,
    constant_offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """Plain-PyTorch :func:`deform_mix_computed_offsets`, with the same arguments (checked there)."""
    with autocast.disabled(x.device):
        offset = functional.conv2d(positions, offset_weight, padding=1, groups=2) + constant_offset
        return reference.deform_mix(x, offset, weight, bias, activation)


def _check_arguments(
    x: Tensor,
    positions: Tensor,
    offset_weight: Tensor,
    constant_offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    batch, channels, height, width = x.shape
    checks.expect(channels > 0 and channels % 2 == 0, "x", "an even number of channels", x.shape)
    checks.expect(height * width > 0, "x", "a map of at least one pixel", x.shape)
    checks.expect_device("positions", positions, "x", x)
    expected = torch.promote_types(x.dtype, torch.float32)
    if positions.dtype != expected:
        raise TypeError(f"positions: expected dtype {expected}, got {positions.dtype}")
    checks.expect_shape("positions", positions, (batch, MAPS, height, width))
    checks.expect_like("offset_weight", offset_weight, "positions", positions)
    checks.expect_shape("offset_weight", offset_weight, (2 * channels, *WINDOW))
    checks.expect_like("constant_offset", constant_offset, "positions", positions)
    checks.expect_shape("constant_offset", constant_offset, (1, 2 * channels, height, width))
    checks.expect_like("weight", weight, "x", x)
    checks.expect(weight.shape[0] > 0, "weight", "no empty dimension", weight.shape)
    checks.expect_shape("weight", weight, (weight.shape[0], channels, 1, 1))
    if bias is not None:
        checks.expect_like("bias", bias, "x", x)
        checks.expect_shape("bias", bias, (weight.shape[0],))


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

    Three TF32 products (high·high, high·low, low·high) leave out 2⁻²² of the result: as fp32, and twice as
    fast as exact fp32 products would be.
    """
    if backend.INTERPRETED:
        return "interpreter"
    return "ieee" if torch.version.hip else "tf32x3"


def gradient_precision(dtype: torch.dtype) -> str:
    """How gradients that arrive at offsets go on: in TF32 if products in ``dtype`` rounded them before."""
    if backend.INTERPRETED:
        return "interpreter"
    rounded = dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
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
    # per thread fit, one with fp32.
    wide = call.x.dtype != torch.float32
    channels, pixels = block(call.x.shape[1] // 2, 32 if wide else 16), 16
    out = block(call.weight.shape[0], 32)
    blocks, pixel_blocks = 2 * call.half_steps(channels), triton.cdiv(call.pixels, pixels)
    share = triton.cdiv(pixel_blocks, triton.cdiv(SAMPLES_PROGRAMS, blocks))
    splits = triton.cdiv(pixel_blocks, share)
    partial = None
    if wants_offset_weight:
        partial = call.offset_weight.new_empty((splits, *call.offset_weight.shape))
    plan = Launch(
        kernels.backward_samples,
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
        kernels.backward_weight,
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


def _fake_forward(
    x: Tensor,
    positions: Tensor,
    offset_weight: Tensor,
    constant_offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    memory_format = torch.channels_last if layout.is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    output = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    return output, x.new_empty(0) if activation == "identity" else torch.empty_like(output)


def _forward(
    x: Tensor,
    positions: Tensor,
    offset_weight: Tensor,
    constant_offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The output, and its value before the activation, which is empty if there is none."""
    output, pre = _fake_forward(x, positions, offset_weight, constant_offset, weight, bias, activation)
    call = Call.of(x, positions, offset_weight, constant_offset, weight)
    bias = None if bias is None else bias.contiguous()
    run(plan_forward(call, bias, output, activation, None if activation == "identity" else pre), x.device)
    return output, pre


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, bias, activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])
    ctx.has_bias, ctx.activation = bias is not None, activation
    # The user may have left the region that asked for it by the time the backward pass runs.
    ctx.deterministic = torch.are_deterministic_algorithms_enabled()


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    positions: Tensor,
    offset_weight: Tensor,
    constant_offset: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str,
    wanted: list[bool],
    deterministic: bool,
) -> list[Tensor]:
    like = (x, positions, offset_weight, constant_offset, weight, weight[:, 0, 0, 0])
    return [
        tensor.new_empty(tensor.shape if want else (0,)) for tensor, want in zip(like, wanted, strict=True)
    ]


def _backward(
    grad: Tensor,
    x: Tensor,
    positions: Tensor,
    offset_weight: Tensor,
    constant_offset: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str,
    wanted: list[bool],
    deterministic: bool,
) -> list[Tensor]:
    """Gradients of the six tensors, bias last, an empty tensor for each that is not wanted."""
    if activation != "identity":  # kernels find z where they find its gradient
        last = layout.is_channels_last(pre)
        grad = grad.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    call = Call.of(x, positions, offset_weight, constant_offset, weight)
    grad = layout.dense(grad)
    epilogue = Epilogue(activation, None if activation == "identity" else pre)
    results: list[Tensor | None] = [None] * 6
    tensors = (x, positions, offset_weight, constant_offset, weight, weight[:, 0, 0, 0])
    if grad.numel() == 0:
        results = [tensor.new_zeros(tensor.shape) for tensor in tensors]
    else:
        if any(wanted[:4]):
            results[:4] = _backward_samples(call, grad, epilogue, wanted, deterministic)
        if wanted[4] or wanted[5]:
            plan, partial, bias_partial = plan_backward_weight(call, grad, epilogue, wanted[5])
            run(plan, grad.device)
            results[4] = partial.sum(0).view(weight.shape).to(weight.dtype)
            results[5] = None if bias_partial is None else bias_partial.sum(0).to(weight.dtype)
    return [
        result if want else tensor.new_empty(0)
        for result, want, tensor in zip(results, wanted, tensors, strict=True)
    ]


def _backward_samples(
    call: Call, grad: Tensor, epilogue: Epilogue, wanted: list[bool], deterministic: bool
) -> list[Tensor | None]:
    """Gradients of x, positions, offset weight and constant offset."""
    scale = None
    if deterministic and (wanted[0] or wanted[1]):
        scale = fixed_point_scales(call, grad, epilogue)
    sums = torch.float32 if scale is None else torch.int64
    grad_input = torch.zeros_like(call.x, dtype=sums) if wanted[0] else None
    grad_positions = torch.zeros_like(call.positions, dtype=sums) if wanted[1] else None
    grad_constant = torch.empty_like(call.constant_offset) if wanted[3] else None
    plan, partial = plan_backward_samples(
        call, grad, epilogue, grad_input, grad_positions, wanted[2], grad_constant, scale
    )
    run(plan, grad.device)
    if scale is not None:
        grad_input = None if grad_input is None else grad_input.double() / scale[0]
        grad_positions = None if grad_positions is None else (grad_positions.double() / scale[1]).float()
    return [
        None if grad_input is None else grad_input.to(call.x.dtype),
        grad_positions,
        None if partial is None else partial.sum(0)[:, :, :TAPS].reshape(-1, *WINDOW),
        grad_constant,
    ]


def _differentiate(
    ctx: Any, backward: Any, grad: Tensor | None, grad_pre: Tensor | None
) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:6])
    if grad is None:
        return (None,) * 7
    gradients = backward(grad, *ctx.saved_tensors, ctx.activation, wanted, ctx.deterministic)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None


# computed_offsets_op(x, positions, offset_weight, constant_offset, weight, bias, activation) -> output, pre
computed_offsets_op = RegisteredOp(
    "degmix::deform_mix_computed_offsets",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    _fake_backward,
    _differentiate,
)


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
