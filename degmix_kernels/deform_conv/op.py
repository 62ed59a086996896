"""Deformable convolution, the public functions: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import autocast, backend, checks, maps
from degmix_kernels.activation import ACTIVATIONS
from degmix_kernels.deform_conv import reference
from degmix_kernels.launch import INT32_MAX

if backend.HAS_TRITON:
    from degmix_kernels.deform_conv.autograd import conv_op, mix_op


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
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Dai et al., arXiv 1703.06211, equation 2; Zhu et al., arXiv 1811.11168, equation 1, with the mask.
    """
    for name, value in {"input": input, "offset": offset, "weight": weight}.items():
        checks.expect_tensor(name, value, dims=4)
    if mask is not None:
        checks.expect_tensor("mask", mask, dims=4)
    if bias is not None:
        checks.expect_tensor("bias", bias, dims=1)
    input, weight, bias, mask = autocast.cast_inputs(input.device, input, weight, bias, mask)
    offset = autocast.widen_other_half(offset, input)
    stride, padding, dilation = (
        checked_pair("stride", stride, 1),
        checked_pair("padding", padding, 0),
        checked_pair("dilation", dilation, 1),
    )
    check_arguments(input, offset, weight, bias, stride, padding, dilation, mask)
    if backend.runs_triton("deform_conv2d", input.device, input.dtype):
        return conv_op(input, offset, weight, bias, mask, *stride, *padding, *dilation)
    output = reference.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    if maps.is_channels_last(input):
        output = output.contiguous(memory_format=torch.channels_last)
    return output


def deform_mix(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """DeGMix's spatial mixing, ``activation(W · sample(x, offset) + b)``, one offset per channel and pixel.

    Autocast, layout and special values are those of :func:`deform_conv2d`.

    Args:
        x: (N, C, H, W), floating point.
        offset: (N, 2·C, H, W) in pixels; channel 2i is dy of channel i, 2i + 1 its dx.
        weight: (Cout, C/groups, 1, 1); the number of groups follows from it.
        bias: (Cout,).
        activation: ``"gelu"`` (exact), ``"relu"``, ``"silu"`` or ``"identity"``.
        statistics: whether to return what a BatchNorm of the result needs, gathered in the same pass. Both
            statistics have gradients.

    Returns:
        (N, Cout, H, W), in the dtype of ``x``; with ``statistics`` that, its mean and biased variance over
        images and pixels, both (Cout,) in fp32 (fp64 for doubles).

    Raises:
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows DeGMix, arXiv 2308.05721, the spatial-aware deformable operator.
    """
    checks.expect_choice("activation", activation, tuple(ACTIVATIONS))
    for name, value in {"x": x, "offset": offset, "weight": weight}.items():
        checks.expect_tensor(name, value, dims=4)
    batch, channels, height, width = x.shape
    checks.expect_shape("offset", offset, (batch, 2 * channels, height, width))
    checks.expect_shape("weight", weight, (*weight.shape[:2], 1, 1))
    x, weight, bias = autocast.cast_inputs(x.device, x, weight, bias)
    offset = autocast.widen_other_half(offset, x)
    check_arguments(x, offset, weight, bias, (1, 1), (0, 0), (1, 1), None)
    if backend.runs_triton("deform_mix", x.device, x.dtype):
        leaves = (tensor for tensor in (x, offset, weight, bias) if tensor is not None)
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves)
        output, _, mean, variance = mix_op(x, offset, weight, bias, activation, keep, statistics)
        return (output, mean, variance) if statistics else output
    result = reference.deform_mix(x, offset, weight, bias, activation, statistics)
    if maps.is_channels_last(x):
        output = result[0] if statistics else result
        output = output.contiguous(memory_format=torch.channels_last)
        return (output, *result[1:]) if statistics else output
    return result


def checked_pair(argument: str, value: object, minimum: int) -> tuple[int, int]:
    """The pair behind an integer or a pair of integers, each at least ``minimum``."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or not all(checks.is_integer(each) for each in pair):
        raise TypeError(f"{argument}: expected an integer or a pair of integers, got {value!r}")
    checks.expect(min(pair) >= minimum, argument, f"at least {minimum}", value)
    checks.expect(max(pair) <= INT32_MAX, argument, f"at most {INT32_MAX}", value)  # as coordinates are
    return int(pair[0]), int(pair[1])


def check_arguments(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> None:
    """Raise on any inconsistency between the arguments."""
    batch, channels = input.shape[:2]
    out_channels, group_channels, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    checks.expect_like("weight", weight, "input", input)
    if offset.dtype == torch.float32:
        checks.expect_device("offset", offset, "input", input)
    else:
        checks.expect_like("offset", offset, "input", input)
    checks.expect(channels > 0, "input", "at least one channel", input.shape)
    checks.expect(min(weight.shape) > 0, "weight", "no empty dimension", weight.shape)
    checks.expect(
        channels % group_channels == 0,
        "weight",
        "a second dimension (input channels per group) that divides the channels of input",
        f"{group_channels} for {channels} channels",
    )
    groups = channels // group_channels
    checks.expect(
        out_channels % groups == 0,
        "weight",
        "a first dimension (out channels) divisible by the number of groups",
        f"{out_channels} for {groups} groups",
    )
    out_size = tuple(
        (input.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis]
        + 1
        for axis in (0, 1)
    )
    checks.expect(
        out_size[0] > 0 and out_size[1] > 0, "input", "a padded map no smaller than the kernel", input.shape
    )
    offset_groups = offset.shape[1] // (2 * taps)
    checks.expect(
        offset_groups > 0 and offset.shape[1] % (2 * taps) == 0 and channels % offset_groups == 0,
        "offset",
        "2 · offset groups · kernel taps channels, with offset groups that divide the channels of input",
        offset.shape,
    )
    checks.expect_shape("offset", offset, (batch, 2 * offset_groups * taps, *out_size))
    if mask is not None:
        checks.expect_like("mask", mask, "input", input)
        checks.expect_shape("mask", mask, (batch, offset_groups * taps, *out_size))
    if bias is not None:
        checks.expect_like("bias", bias, "input", input)
        checks.expect_shape("bias", bias, (out_channels,))
