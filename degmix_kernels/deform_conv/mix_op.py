"""DeGMix's operator: deformable convolution with an offset per channel, and an activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from degmix_kernels import backend, checks, maps
from degmix_kernels.activation import ACTIVATIONS
from degmix_kernels.define import Coordinates, define
from degmix_kernels.deform_conv import reference
from degmix_kernels.deform_conv.op import check_weight, empty_output, laid_out_gradients, products
from degmix_kernels.deform_conv.problem import Problem
from degmix_kernels.launch import run

if backend.HAS_TRITON:
    from degmix_kernels.deform_conv.planar import plan
    from degmix_kernels.epilogue import Epilogue
    from degmix_kernels.statistics import finish_statistics

_POINTWISE = (1, 1, 0, 0, 1, 1)  # stride, padding, dilation


class Call(NamedTuple):
    """Arguments of :func:`deform_mix`.

    And whether to keep z, the value before the activation, and whether x's gradient must be deterministic.
    """

    x: Tensor
    offset: Coordinates
    weight: Tensor
    bias: Tensor | None
    activation: Annotated[str, checks.OneOf(tuple(ACTIVATIONS))]
    statistics: bool
    keep: bool
    deterministic: bool


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
        TypeError: for a wrong type, dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows DeGMix, arXiv 2308.05721, the spatial-aware deformable operator.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    call = mix_op.checked(x, offset, weight, bias, activation, statistics, True, deterministic)
    x, offset, weight, bias, activation, statistics, *_ = call
    for name in Call._fields[:4]:
        checks.expect_dims(name, getattr(call, name), 1 if name == "bias" else 4)
    batch, channels, height, width = x.shape
    checks.expect(height > 0 and width > 0, "x", "at least one pixel", x.shape)
    checks.expect_shape("offset", offset, (batch, 2 * channels, height, width))
    checks.expect_shape("weight", weight, (*weight.shape[:2], 1, 1))
    check_weight("x", x, weight, bias)
    if mix_op.runs_triton(call):
        output, mean, variance, _ = mix_op(call)
        return (output, mean, variance) if statistics else output
    result = reference.deform_mix(x, offset, weight, bias, activation, statistics)
    if not statistics:
        return maps.laid_out(x, result)[0]
    output, mean, variance = result
    return maps.laid_out(x, output)[0], mean, variance


def _outputs(call: Call) -> tuple[Tensor, ...]:
    """The result, its mean and its variance, and z; empty where not wanted."""
    output = empty_output(call.x, call.offset, call.weight)
    channels = call.weight.shape[0] if call.statistics else 0
    mean, variance = (call.x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    return output, mean, variance, torch.empty_like(output) if call.keep else call.x.new_empty(0)


def _problem(call: Call) -> Problem:
    return Problem.of(call.x, call.offset, call.weight, None, _POINTWISE)


def _forward(call: Call, output: Tensor, mean: Tensor, variance: Tensor, pre: Tensor) -> None:
    problem = _problem(call)
    blocks = plan.new_statistics(problem) if call.statistics else None
    bias = None if call.bias is None else call.bias.contiguous()
    pre = pre if call.keep else None
    run(
        plan.plan_forward(plan.PLANAR.readable(problem), bias, output, call.activation, pre, blocks),
        output.device,
    )
    if blocks is not None:
        finish_statistics(blocks, problem.out_pixels, mean, variance)


def _keeps(call: Call, made: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    _, mean, _, pre = made
    return pre, mean


def _backward(
    call: Call, kept: Sequence[Tensor], grads: Sequence[Tensor | None], wanted: Call
) -> dict[str, Tensor | None]:
    (pre, mean), (grad, grad_mean, grad_variance), problem = kept, grads, _problem(call)
    # The kernels address the gradient as they address z.
    (grad,) = maps.laid_out(pre, torch.zeros_like(pre) if grad is None else grad)
    # y's own gradient is grad + ∂/∂y (grad_mean · mean + grad_variance · variance), linear in y.
    count = max(problem.batch * problem.out_pixels, 1)
    constant = linear = None
    if call.statistics and grad_variance is not None:
        linear = 2 / count * grad_variance
        constant = -linear * mean
    if call.statistics and grad_mean is not None:
        constant = grad_mean / count + (0 if constant is None else constant)
    epilogue = Epilogue(call.activation, pre, constant, linear)
    flags = (*wanted[:4], False)
    return laid_out_gradients(call, plan.PLANAR.gradients(problem, grad, flags, call.deterministic, epilogue))


mix_op = define(
    "deform_mix", Call, _outputs, _forward, _backward, products, results=3, beside=1, keeps=_keeps, kept=2
)
