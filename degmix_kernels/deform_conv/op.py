"""Deformable convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from degmix_kernels import backend, checks, maps
from degmix_kernels.define import Coordinates, define
from degmix_kernels.deform_conv import reference
from degmix_kernels.deform_conv.problem import Problem
from degmix_kernels.launch import INT32_MAX

if backend.HAS_TRITON:
    from degmix_kernels.deform_conv.general.plan import GENERAL, suits
    from degmix_kernels.deform_conv.path import Path
    from degmix_kernels.deform_conv.planar.plan import PLANAR


class Call(NamedTuple):
    """Arguments of :func:`deform_conv2d`, and whether the gradient of ``input`` must be deterministic."""

    input: Tensor
    offset: Coordinates
    weight: Tensor
    bias: Tensor | None
    mask: Tensor | None
    stride_y: int
    stride_x: int
    padding_y: int
    padding_x: int
    dilation_y: int
    dilation_x: int
    deterministic: bool


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution, a drop-in for ``torchvision.ops.deform_conv2d`` (v2 with ``mask``, else v1).

    Groups and offset groups follow from the shapes, each dividing the channels on its own.

    A sample is 0 where it has no pixel within a distance of 1; an offset's gradient at an integer coordinate
    is the right-hand derivative; a NaN offset gives NaN, an infinite one a sample outside the map. A sample
    at exactly -1 takes its neighbour's pixel times 0, which is NaN if that is infinite or NaN.

    Under autocast ``input``, ``weight``, ``bias`` and ``mask`` are cast to the autocast dtype and the result
    has it; offsets keep their dtype (keep them fp32: they address pixels); doubles are left alone.

    Args:
        input: (N, C, H, W), floating point. channels_last in, channels_last out.
        offset: (N, 2·offset_groups·kh·kw, Ho, Wo) in pixels, fp32 or the dtype of ``input``; channel
            ``2·(g·kh·kw + k)`` is dy of group g at tap k (row-major), the next one its dx.
        weight: (Cout, C/groups, kh, kw).
        bias: (Cout,).
        stride: distance between output pixels, one integer or (vertical, horizontal).
        padding: zeros around the input.
        dilation: distance between kernel taps.
        mask: (N, offset_groups·kh·kw, Ho, Wo), multiplied onto the samples.

    Returns:
        (N, Cout, Ho, Wo), in the dtype of ``input``.

    Raises:
        TypeError: for a wrong type, dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Dai et al., arXiv 1703.06211, equation 2; Zhu et al., arXiv 1811.11168, equation 1, with the mask.
    """
    geometry = (
        *checked_pair("stride", stride, 1),
        *checked_pair("padding", padding, 0),
        *checked_pair("dilation", dilation, 1),
    )
    # The user may have left the region that asks for it by the time the backward pass runs.
    deterministic = torch.are_deterministic_algorithms_enabled()
    call = conv_op.checked(input, offset, weight, bias, mask, *geometry, deterministic)
    for name in Call._fields[:5]:
        checks.expect_dims(name, getattr(call, name), 1 if name == "bias" else 4)
    input, offset, weight, bias, mask, *geometry, _ = call
    check_weight("input", input, weight, bias)
    _check_maps(input, offset, weight.shape[2:], mask, geometry)
    if conv_op.runs_triton(call):
        return conv_op(call)
    output = reference.deform_conv2d(
        input, offset, weight, bias, geometry[:2], geometry[2:4], geometry[4:], mask
    )
    return maps.laid_out(input, output)[0]


def checked_pair(argument: str, value: object, minimum: int) -> tuple[int, int]:
    """The pair behind an integer or a pair of integers, each at least ``minimum``."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(checks.is_integer(each) for each in pair):
        raise TypeError(f"{argument}: expected an integer or a pair of integers, got {checks.shown(value)}")
    checks.expect(min(pair) >= minimum, argument, f"at least {minimum}", value)
    checks.expect(max(pair) <= INT32_MAX, argument, f"at most {INT32_MAX}", value)  # as coordinates are
    return int(pair[0]), int(pair[1])


def check_weight(argument: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless the weight, and so the number of groups, fits the input, which ``argument`` names."""
    channels, (out_channels, group_channels, *_) = input.shape[1], weight.shape
    checks.expect(channels > 0, argument, "at least one channel", input.shape)
    checks.expect(min(weight.shape) > 0, "weight", "no empty dimension", weight.shape)
    checks.expect(
        channels % group_channels == 0,
        "weight",
        f"a second dimension (input channels per group) that divides the channels of {argument}",
        f"{group_channels} for {channels} channels",
    )
    groups = channels // group_channels
    checks.expect(
        out_channels % groups == 0,
        "weight",
        "a first dimension (out channels) divisible by the number of groups",
        f"{out_channels} for {groups} groups",
    )
    checks.expect_shape("bias", bias, (out_channels,))


def _check_maps(
    input: Tensor, offset: Tensor, kernel: Sequence[int], mask: Tensor | None, geometry: Sequence[int]
) -> None:
    """Raise unless offset and mask are as large as the output."""
    (batch, channels), taps = input.shape[:2], kernel[0] * kernel[1]
    stride, padding, dilation = geometry[:2], geometry[2:4], geometry[4:]
    height, width = (
        (input.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis]
        + 1
        for axis in (0, 1)
    )
    fits = height > 0 and width > 0
    checks.expect(fits, "input", "a padded map no smaller than the kernel", input.shape)
    offset_groups = offset.shape[1] // (2 * taps)
    checks.expect(
        offset_groups > 0 and offset.shape[1] % (2 * taps) == 0 and channels % offset_groups == 0,
        "offset",
        "2 · offset groups · kernel taps channels, with offset groups that divide the channels of input",
        offset.shape,
    )
    checks.expect_shape("offset", offset, (batch, 2 * offset_groups * taps, height, width))
    checks.expect_shape("mask", mask, (batch, offset_groups * taps, height, width))


def empty_output(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """The result, uninitialised: channels_last if the input is."""
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=maps.memory_format(input))


def _outputs(call: Call) -> Tensor:
    return empty_output(call.input, call.offset, call.weight)


def _problem(call: Call) -> tuple[Problem, Path]:
    """The call as kernels see it, and the kernels for it."""
    problem = Problem.of(call.input, call.offset, call.weight, call.mask, call[5:11])
    return problem, GENERAL if suits(problem) else PLANAR


def _forward(call: Call, output: Tensor) -> None:
    problem, path = _problem(call)
    path.forward(problem, call.bias, output)


def _backward(
    call: Call, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Call
) -> dict[str, Tensor | None]:
    problem, path = _problem(call)
    gradients = path.gradients(problem, grads[0], wanted[:5], call.deterministic)
    return laid_out_gradients(call, gradients)


def laid_out_gradients(call: NamedTuple, gradients: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """Gradients by names; the weight's in the weight's own layout, not in that of the kernels."""
    found = dict(zip(call._fields, gradients, strict=False))
    if found["weight"] is not None:
        found["weight"] = maps.empty_like(call.weight).copy_(found["weight"])
    return found


def products(call: Call) -> int:
    """2 · pixels · Cout · C/groups · kh · kw: W times the samples; blending them is no product."""
    return 2 * call.offset.shape[0] * math.prod(call.offset.shape[2:]) * call.weight.numel()


conv_op = define("deform_conv2d", Call, _outputs, _forward, _backward, products)
