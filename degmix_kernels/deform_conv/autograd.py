"""The registered ops behind ``deform_conv2d`` and ``deform_mix``: path, allocation, parts of the batch.

Two sets of kernels do the work: the general ones where blocks of 16 channels or more share offsets and
weights, the planar ones everywhere else. Neither builds columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from degmix_kernels import layout
from degmix_kernels.deform_conv import general, planar
from degmix_kernels.deform_conv.problem import PART_SHARE, Problem, ceil_div
from degmix_kernels.epilogue import Epilogue, finish_statistics
from degmix_kernels.launch import run
from degmix_kernels.registered import RegisteredOp


def _problem(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, geometry: tuple[int, ...]
) -> tuple[Problem, ModuleType]:
    """The call on dense tensors, and its path. ``geometry``: stride, padding, dilation, each (y, x)."""
    mask = None if mask is None else layout.dense(mask)
    # Taps last: neighbouring channels of the weight are then neighbours in memory, as kernels read them.
    weight = weight.contiguous(memory_format=torch.channels_last)
    pairs = geometry[0:2], geometry[2:4], geometry[4:6]
    problem = Problem(layout.dense(input), layout.dense(offset), weight, mask, *pairs)
    return problem, general if general.suits(problem) else planar


def _parts(problem: Problem, bytes_per_image: int) -> Iterator[tuple[Problem, slice]]:
    """The call in parts of the batch, as few and as equal as possible, given what an image needs temporarily.

    A part's temporaries take ``PART_SHARE`` of the column buffer at most, or what one image needs.
    """
    batch = images = problem.batch
    if bytes_per_image > 0 and batch > 1:
        budget = PART_SHARE * problem.columns * problem.input.element_size()
        images = min(batch, max(1, int(budget // bytes_per_image)))
    if images == batch:
        if batch > 0:
            yield problem, slice(None)
        return
    images = ceil_div(batch, ceil_div(batch, images))
    for start in range(0, batch, images):
        part = slice(start, min(start + images, batch))
        yield problem.images(part.start, part.stop), part


def _copied_bytes(problem: Problem, path: ModuleType) -> int:
    """Bytes of the copy of an image that a path needs to have it in the layout it reads."""
    if path is planar or problem.input.is_contiguous(memory_format=torch.channels_last):
        return 0
    return problem.input[:1].numel() * problem.input.element_size()


def _readable(problem: Problem, path: ModuleType) -> Problem:
    """The call with its input in the layout a path reads."""
    if _copied_bytes(problem, path) == 0:
        return problem
    return replace(problem, input=problem.input.contiguous(memory_format=torch.channels_last))


def _empty_output(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """The result, uninitialised: channels_last if the input is."""
    last = layout.is_channels_last(input)
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)


def _empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A dense tensor like this one, uninitialised: channels_last or contiguous."""
    last = layout.is_channels_last(tensor)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(tensor, dtype=dtype, memory_format=memory_format)


def _empty_gradients(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, wanted: list[bool]
) -> list[Tensor]:
    """Gradients of input, offset, weight, bias and mask, uninitialised; an empty tensor where not wanted."""
    none = input.new_empty(0)
    like = [
        lambda: _empty_like(input),
        lambda: _empty_like(offset),
        lambda: torch.empty_like(weight, memory_format=torch.contiguous_format),
        lambda: weight.new_empty(weight.shape[0]),
        lambda: none if mask is None else _empty_like(mask),
    ]
    return [make() if want else none.clone() for make, want in zip(like, wanted, strict=True)]


def _gradients(
    problem: Problem,
    path: ModuleType,
    grad: Tensor,
    epilogue: Epilogue | None,
    results: list[Tensor],
    wanted: list[bool],
    deterministic: bool,
) -> None:
    """Fill ``results``, gradients of input, offset, weight, bias and mask, where wanted.

    A part of the batch at a time, to keep the temporaries small: an image in the layout a path reads, and the
    sums of the input's gradient, where they are not the result itself.
    """
    grad_input, grad_offset, _, _, grad_mask = (
        result if want else None for result, want in zip(results, wanted, strict=True)
    )
    wants_input, wants_offset, wants_weight, wants_bias, wants_mask = wanted
    scale = None
    if wants_input and deterministic and grad.numel() > 0:
        scale = planar.fixed_point_scale(problem, grad, epilogue)
    bytes_per_image = _copied_bytes(problem, path)
    in_place = wants_input and scale is None and grad_input.dtype == torch.float32 and bytes_per_image == 0
    if in_place:
        grad_input.zero_()
    elif wants_input:
        bytes_per_image += problem.input[:1].numel() * (4 if scale is None else 8 + 4)
    fused = epilogue is not None  # the bias gradient then sums what the weight's kernel computes anyway
    sums_weight = sums_bias = None

    for part, images in _parts(problem, bytes_per_image):
        part = _readable(part, path)
        extra = () if epilogue is None else (replace(epilogue, pre=epilogue.pre[images]),)
        if wants_input or wants_offset or wants_mask:
            sums = None
            if in_place:
                sums = grad_input[images]
            elif wants_input:
                sums = torch.zeros_like(part.input, dtype=torch.float32 if scale is None else torch.int64)
            offsets, masks = (None if each is None else each[images] for each in (grad_offset, grad_mask))
            plan = path.plan_backward_samples(part, grad[images], sums, offsets, masks, scale, *extra)
            run(plan, grad.device)
            if wants_input and not in_place:
                grad_input[images] = sums if scale is None else sums * scale.reciprocal()
            del sums
        if wants_weight or (wants_bias and fused):
            plan, partial, *partial_bias = path.plan_backward_weight(
                part, grad[images], *extra, *((wants_bias,) if fused else ())
            )
            run(plan, grad.device)
            partial = partial.sum(0)
            sums_weight = partial if sums_weight is None else sums_weight.add_(partial)
            if wants_bias and fused:
                partial = partial_bias[0].sum(0)
                sums_bias = partial if sums_bias is None else sums_bias.add_(partial)
    if problem.batch == 0:
        for result in (results[2], results[3]):
            result.zero_()
        return
    if wants_weight:
        results[2].copy_(path.finish_weight(sums_weight, problem.weight))
    if wants_bias:
        results[3].copy_(sums_bias if fused else grad.sum((0, 2, 3), dtype=torch.float32))


# --- deform_conv2d -----------------------------------------------------------------------------------------


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
    dilation_y: int,
    dilation_x: int,
) -> Tensor:
    geometry = (stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
    output = _empty_output(input, offset, weight)
    problem, path = _problem(input, offset, weight, mask, geometry)
    bias = None if bias is None else bias.contiguous()
    for part, images in _parts(problem, _copied_bytes(problem, path)):
        run(path.plan_forward(_readable(part, path), bias, output[images]), input.device)
    return output


def _fake_forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *geometry: int,
) -> Tensor:
    return _empty_output(input, offset, weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, _, mask, *geometry = inputs
    ctx.save_for_backward(input, offset, weight, mask)
    ctx.geometry = geometry
    # The user may have left the region that asked for it by the time the backward pass runs.
    ctx.deterministic = torch.are_deterministic_algorithms_enabled()


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
    dilation_y: int,
    dilation_x: int,
    wanted: list[bool],
    deterministic: bool,
) -> list[Tensor]:
    """Gradients of input, offset, weight, bias and mask, an empty tensor for each that is not wanted."""
    geometry = (stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
    results = _empty_gradients(input, offset, weight, mask, wanted)
    problem, path = _problem(input, offset, weight, mask, geometry)
    _gradients(problem, path, layout.dense(grad), None, results, wanted, deterministic)
    return results


def _fake_backward(
    grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *rest: Any
) -> list[Tensor]:
    return _empty_gradients(input, offset, weight, mask, rest[-2])


def _differentiate(ctx: Any, backward: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:5])
    gradients = backward(grad, input, offset, weight, mask, *ctx.geometry, wanted, ctx.deterministic)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 6


# conv_op(input, offset, weight, bias, mask, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x)
conv_op = RegisteredOp(
    "degmix::deform_conv2d",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
    _fake_backward,
    _differentiate,
)


# --- deform_mix --------------------------------------------------------------------------------------------

_POINTWISE = (1, 1, 0, 0, 1, 1)  # stride, padding, dilation


def _mix_forward(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    keep: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, its value before the activation, its mean and its variance, empty if not to be kept."""
    output, pre, mean, variance = _fake_mix_forward(x, offset, weight, bias, activation, keep, statistics)
    problem, path = _problem(x, offset, weight, None, _POINTWISE)
    parts = path.new_statistics(problem) if statistics else None
    bias = None if bias is None else bias.contiguous()
    run(path.plan_forward(problem, bias, output, activation, pre if keep else None, parts), x.device)
    if parts is not None:
        mean, variance = finish_statistics(parts, problem.out_pixels)
    return output, pre, mean, variance


def _fake_mix_forward(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    keep: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def vector() -> Tensor:
        return x.new_empty(weight.shape[0] if statistics else 0, dtype=torch.float32)

    output = _empty_output(x, offset, weight)
    return output, torch.empty_like(output) if keep else x.new_empty(0), vector(), vector()


def _setup_mix_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, offset, weight, _, activation, _, statistics = inputs
    _, pre, mean, _ = output
    ctx.save_for_backward(x, offset, weight, pre, mean if statistics else None)
    ctx.set_materialize_grads(False)
    ctx.activation = activation
    ctx.deterministic = torch.are_deterministic_algorithms_enabled()


def _mix_backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    pre: Tensor,
    mean: Tensor | None,
    activation: str,
    wanted: list[bool],
    deterministic: bool,
) -> list[Tensor]:
    """Gradients of x, offset, weight and bias, an empty tensor for each that is not wanted."""
    results = _fake_mix_backward(
        grad, grad_mean, grad_variance, x, offset, weight, pre, mean, activation, wanted, deterministic
    )
    problem, path = _problem(x, offset, weight, None, _POINTWISE)
    grad = torch.zeros_like(pre) if grad is None else grad
    # The kernels address the gradient as they address z.
    grad = grad.contiguous(
        memory_format=torch.channels_last if layout.is_channels_last(pre) else torch.contiguous_format
    )
    # y's own gradient is grad + ∂/∂y (grad_mean · mean + grad_variance · variance), linear in y.
    constant = linear = None
    count = max(problem.batch * problem.out_pixels, 1)
    if grad_variance is not None:
        linear = 2 / count * grad_variance
        constant = -linear * mean
    if grad_mean is not None:
        constant = grad_mean / count + (0 if constant is None else constant)
    epilogue = Epilogue(activation, pre, constant, linear)
    _gradients(problem, path, grad, epilogue, [*results, grad], [*wanted, False], deterministic)
    return results


def _fake_mix_backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    pre: Tensor,
    mean: Tensor | None,
    activation: str,
    wanted: list[bool],
    deterministic: bool,
) -> list[Tensor]:
    return _empty_gradients(x, offset, weight, None, [*wanted, False])[:4]


def _differentiate_mix(
    ctx: Any,
    backward: Any,
    grad: Tensor | None,
    grad_pre: Tensor | None,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
) -> tuple[Tensor | None, ...]:
    x, offset, weight, pre, mean = ctx.saved_tensors
    if mean is None:
        grad_mean = grad_variance = None
    wanted = list(ctx.needs_input_grad[:4])
    gradients = backward(
        grad, grad_mean, grad_variance, x, offset, weight, pre, mean, ctx.activation, wanted,
        ctx.deterministic,
    )  # fmt: skip
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None, None


# mix_op(x, offset, weight, bias, activation, keep, statistics) -> (result, z, mean, variance)
mix_op = RegisteredOp(
    "degmix::deform_mix",
    _mix_forward,
    _fake_mix_forward,
    _setup_mix_context,
    _mix_backward,
    _fake_mix_backward,
    _differentiate_mix,
)
