"""DeGMix's operator with its offsets computed inside the kernels: function and registered op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from degmix_kernels import autocast, backend, checks, layout
from degmix_kernels.activation import ACTIVATIONS
from degmix_kernels.deform_conv import reference
from degmix_kernels.deform_conv.computed_offsets_plans import (
    MAPS,
    TAPS,
    WINDOW,
    Call,
    fixed_point_scales,
    plan_backward_samples,
    plan_backward_weight,
    plan_forward,
)
from degmix_kernels.epilogue import Epilogue
from degmix_kernels.launch import run
from degmix_kernels.registered import RegisteredOp


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
