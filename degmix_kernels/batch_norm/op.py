"""Normalisation by given statistics, the public function: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import autocast, backend, checks, layout
from degmix_kernels.batch_norm import reference

if backend.HAS_TRITON:
    from degmix_kernels.batch_norm.autograd import norm_op


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
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Ioffe and Szegedy, arXiv 1502.03167, algorithm 1.
    """
    checks.expect_tensor("x", x)
    checks.expect(x.dim() in (2, 4), "x", "2 or 4 dimensions", x.shape)
    checks.expect(x.shape[1] > 0, "x", "at least one channel", x.shape)
    vectors = {"mean": mean, "variance": variance, "weight": weight, "bias": bias}
    for name, vector in vectors.items():
        if vector is not None or name in ("mean", "variance"):
            checks.expect_tensor(name, vector)
            checks.expect_device(name, vector, "x", x)
            checks.expect_shape(name, vector, (x.shape[1],))
    x, residual = autocast.cast_inputs(x.device, x, residual)
    if residual is not None:
        checks.expect_tensor("residual", residual)
        checks.expect_like("residual", residual, "x", x)
        checks.expect_shape("residual", residual, tuple(x.shape))
    if backend.runs_triton("batch_norm", x.device, x.dtype):
        return norm_op(x, mean, variance, weight, bias, residual, eps)
    output = reference.batch_norm(x, mean, variance, weight, bias, residual, eps)
    if x.dim() == 4 and layout.is_channels_last(x):
        output = output.contiguous(memory_format=torch.channels_last)
    return output
