"""Attention over tasks at each pixel, the public function: checks, autocast, choice of backend."""

from __future__ import annotations

from torch import Tensor

from degmix_kernels import autocast, backend, checks
from degmix_kernels.task_attention import reference

MAX_TASKS = 8


def task_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax attention over at most eight tasks, separately at every pixel.

    ``out[b, s, n] = Σ_t softmax_t(q[b, s, n] · k[b, t, n] / √head_dim) v[b, t, n]``, per head.
    There is no Triton kernel yet: every device runs the reference.

    Under autocast all three tensors are cast to the autocast dtype, which the result has; doubles are left
    alone.

    Args:
        query: (B, S, N, C), the tokens of S query tasks at N pixels; floating point.
        key: (B, T, N, C), of T tasks, 1 to 8.
        value: (B, T, N, C).
        heads: number of heads; divides C.

    Returns:
        (B, S, N, C), in the dtype of ``query``.

    Raises:
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape or value.

    Follows DeGMix, arXiv 2308.05721, the task query block, as its published weights were trained.
    """
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        checks.expect_tensor(name, tensor, dims=4)
    query, key, value = autocast.cast_inputs(query.device, query, key, value)
    batch, _, pixels, channels = query.shape
    tasks = key.shape[1]
    check_heads(channels, heads)
    checks.expect(1 <= tasks <= MAX_TASKS, "key", f"1 to {MAX_TASKS} tasks on axis 1", f"{tasks} tasks")
    for name, tensor in {"key": key, "value": value}.items():
        checks.expect_like(name, tensor, "query", query)
        checks.expect_shape(name, tensor, (batch, tasks, pixels, channels))
    backend.runs_triton("task_attention", query.device, query.dtype, missing="this op")
    return reference.task_attention(query, key, value, heads)


def check_heads(channels: int, heads: object) -> None:
    """Raise unless ``heads`` is a positive integer that divides the channel count."""
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise TypeError(f"heads: expected an integer, got {type(heads).__name__}")
    divides = heads > 0 and channels > 0 and channels % heads == 0
    checks.expect(divides, "heads", f"a divisor of {channels} channels", heads)
