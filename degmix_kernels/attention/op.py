"""Attention over all tokens, the public functions: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels import autocast, backend, checks
from degmix_kernels.attention import reference

if backend.HAS_TRITON:
    from degmix_kernels.attention.autograd import attention_op
    from degmix_kernels.attention.linear_autograd import linear_op

LARGEST_HEAD_DIM = 128  # of the kernels, whose tiles hold all channels of a head


def gated_attention(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Softmax attention over all tokens, gated: ``softmax(Q Kᵀ / √D) V ⊙ gate + residual``.

    Triton never forms the N×M matrix; its kernels take heads of up to 128 channels, wider ones run the
    reference, PyTorch's ``scaled_dot_product_attention`` in fp32, on every device.

    Under autocast all tensors are cast to the autocast dtype, which the result has; doubles are left alone.

    Args:
        query: (B, heads, N, D), floating point.
        key: (B, heads, M, D), M at least 1.
        value: (B, heads, M, D).
        gate: (B, heads, N, D), multiplied onto the attended values.
        residual: (B, heads, N, D), added last.

    Returns:
        (B, heads, N, D), in the dtype of ``query``.

    Raises:
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Vaswani et al., arXiv 1706.03762, equation 1; the gate as in Qiu et al., arXiv 2505.06708.
    """
    query, key, value, gate, residual = _cast_checked(query, key, value, gate=gate, residual=residual)
    if backend.runs_triton("gated_attention", query.device, query.dtype, missing=_missing(query)):
        differentiated = (query, key, value) if gate is None else (query, key, value, gate)
        save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiated)
        return attention_op(query, key, value, gate, residual, save)[0]
    return reference.gated_attention(query, key, value, gate, residual)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention without softmax, ``Q (Kᵀ V) · scale``: linear in the number of tokens.

    Kᵀ V is summed in fp32 and takes the scale. Triton kernels take heads of up to 128 channels; wider ones
    run the reference on every device.

    Under autocast all tensors are cast to the autocast dtype, which the result has; doubles are left alone.

    Args:
        query: (B, heads, N, D), floating point.
        key: (B, heads, M, D), M at least 1.
        value: (B, heads, M, D).
        scale: factor on the result; 1/√D in DeGMix.

    Returns:
        (B, heads, N, D), in the dtype of ``query``.

    Raises:
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows DeGMix, arXiv 2308.05721, as in its authors' later program.
    """
    query, key, value = _cast_checked(query, key, value)
    if backend.runs_triton("linear_attention", query.device, query.dtype, missing=_missing(query)):
        return linear_op(query, key, value, scale)[0]
    return reference.linear_attention(query, key, value, scale)


def _missing(query: Tensor) -> str:
    """What has no Triton kernel: heads with more channels than a tile can hold."""
    return f"head dimension above {LARGEST_HEAD_DIM}" if query.shape[3] > LARGEST_HEAD_DIM else ""


def _cast_checked(
    query: Tensor, key: Tensor, value: Tensor, **like_query: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Apply the autocast rule, then raise on any inconsistency."""
    tensors = {"query": query, "key": key, "value": value, **like_query}
    for name, tensor in tensors.items():
        if tensor is not None or name not in like_query:
            checks.expect_tensor(name, tensor, dims=4)
    cast = autocast.cast_inputs(query.device, *tensors.values())
    query, key = cast[:2]
    batch, heads, _, head_dim = query.shape
    checks.expect(head_dim > 0 and heads > 0, "query", "at least one head and channel", tuple(query.shape))
    checks.expect(key.shape[2] > 0, "key", "at least one token", f"shape {tuple(key.shape)}")
    context_shape = (batch, heads, key.shape[2], head_dim)
    for name, tensor in zip(tensors, cast, strict=True):
        if tensor is not None:
            checks.expect_like(name, tensor, "query", query)
            shape = context_shape if name in ("key", "value") else tuple(query.shape)
            checks.expect_shape(name, tensor, shape)
    return cast
