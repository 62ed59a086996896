"""Normalisation by given statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from degmix_kernels import backend, checks, maps
from degmix_kernels.batch_norm import reference
from degmix_kernels.define import NotNegative, OwnDtype, define
from degmix_kernels.launch import run

if backend.HAS_TRITON:
    from degmix_kernels.batch_norm import plan


class Call(NamedTuple):
    """Arguments of :func:`batch_norm`."""

    x: Tensor
    mean: OwnDtype
    variance: OwnDtype
    weight: OwnDtype | None
    bias: OwnDtype | None
    residual: Tensor | None
    eps: NotNegative


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise by given statistics: ``(x − mean) / √(variance + eps) · weight + bias + residual``.

    The second half of a BatchNorm, whose first half, the statistics, came with x from the kernel that made it
    (:func:`degmix_kernels.deform_mix`), or are running ones. Statistics have gradients like everything
    else; what depends on x through them flows back through whatever computed them.

    Under autocast ``x`` and ``residual`` are cast to the autocast dtype and the result has it; the vectors
    keep their dtype (keep them fp32); doubles are left alone.

    Args:
        x: (N, C, H, W) or (tokens, C), floating point. channels_last in, channels_last out.
        mean: (C,), of any floating-point dtype, as all vectors.
        variance: (C,), the biased one in training.
        weight: (C,), 1 if None.
        bias: (C,), 0 if None.
        residual: shape and dtype of ``x``, added last.
        eps: added to the variance.

    Returns:
        Shape, dtype and layout of ``x``.

    Raises:
        TypeError: for a wrong type, dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Ioffe and Szegedy, arXiv 1502.03167, algorithm 1.
    """
    call = op.checked(x, mean, variance, weight, bias, residual, eps)
    shape = call.x.shape
    checks.expect(len(shape) in (2, 4), "x", "2 or 4 dimensions", shape)
    checks.expect(shape[1] > 0, "x", "at least one channel", shape)
    for name in Call._fields[1:5]:
        checks.expect_shape(name, getattr(call, name), shape[1:2])
    checks.expect_shape("residual", call.residual, shape)
    if op.runs_triton(call):
        return op(call)
    return maps.laid_out(call.x, reference.batch_norm(*call))[0]


def _outputs(call: Call) -> Tensor:
    return maps.empty_like(call.x)


def _forward(call: Call, output: Tensor) -> None:
    x, residual = maps.laid_out(output, call.x, call.residual)
    run(plan.plan_forward(x, *maps.contiguous(*call[1:5]), residual, output, call.eps), output.device)


def _backward(
    call: Call, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Call
) -> dict[str, Tensor | None]:
    x, grad = maps.laid_out(call.x, call.x, grads[0])
    mean, variance, weight = maps.contiguous(*call[1:4])
    grad_x = torch.empty_like(x) if wanted.x else None
    sums, products = any(wanted[1:5]), wanted.variance or wanted.weight
    vectors = [torch.empty_like(mean, dtype=torch.float32) if want else None for want in wanted[1:5]]
    launch, partial = plan.plan_backward(grad, x, mean, variance, weight, grad_x, sums, products, call.eps)
    run(launch, x.device)
    if sums:
        run(plan.plan_finish(partial, variance, weight, *vectors, call.eps), x.device)
    return dict(zip(Call._fields, (grad_x, *vectors), strict=False))


op = define(
    "batch_norm", Call, _outputs, _forward, _backward, products=lambda call: 0, passed_on=("residual",)
)
