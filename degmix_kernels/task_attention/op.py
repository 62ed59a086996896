"""Attention over tasks at each pixel, the public function: checks, autocast, choice of backend."""

from __future__ import annotations

from torch import Tensor

from degmix_kernels import autocast, backend, checks
from degmix_kernels.task_attention import reference

if backend.HAS_TRITON:
    from degmix_kernels.task_attention.autograd import attention_op

MAX_TASKS = 8
MAX_HEAD_DIM = 1024  # of the kernels, in which a row of a head is one tile wide


def task_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    heads: int = 1,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over at most eight tasks, separately at every pixel.

    ``out[b, s, n] = Σ_t softmax_t(scale · q[b, s, n] · k[b, t, n]) v[b, t, n]``, per head.

    Under autocast all tensors are cast to the autocast dtype, which the result has; doubles are left alone.

    Args:
        query: (B, S, N, heads·D), the tokens of S query tasks at N pixels; floating point.
        key: (B, T, N, heads·D), of T tasks, 1 to 8; or (B, T, N, D), which all heads share.
        value: shape of ``key``. None: the keys are the values too, and are read once.
        heads: number of heads; divides the channels of ``query``.
        scale: factor on the scores; 1/√D if None.

    Returns:
        (B, S, N, heads·D), in the dtype of ``query``.

    Raises:
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows DeGMix, arXiv 2308.05721, the task query block, as its published weights were trained.
    """
    if value is key:
        value = None
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor is not None or name != "value":
            checks.expect_tensor(name, tensor, dims=4)
    query, key, value = autocast.cast_inputs(query.device, query, key, value)
    batch, query_tasks, pixels, channels = query.shape
    checks.expect(query_tasks > 0, "query", "at least one task on axis 1", query_tasks)
    check_heads(channels, heads)
    head_dim = channels // heads
    if scale is None:
        scale = head_dim**-0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
    tasks = key.shape[1]
    checks.expect(1 <= tasks <= MAX_TASKS, "key", f"1 to {MAX_TASKS} tasks on axis 1", f"{tasks} tasks")
    if key.shape[3] not in (channels, head_dim):
        own = f"{channels} channels on axis 3, or {head_dim} for all heads"
        checks.expect(False, "key", own, f"{key.shape[3]} channels")
    for name, tensor in {"key": key, "value": value}.items():
        if tensor is not None:
            checks.expect_like(name, tensor, "query", query)
            checks.expect_shape(name, tensor, (batch, tasks, pixels, key.shape[3]))
    missing = f"a head dimension above {MAX_HEAD_DIM}" if head_dim > MAX_HEAD_DIM else ""
    if backend.runs_triton("task_attention", query.device, query.dtype, missing=missing):
        return attention_op(query, key, value, heads, float(scale))
    return reference.task_attention(query, key, value, heads, scale)


def check_heads(channels: int, heads: object) -> None:
    """Raise unless ``heads`` is a positive integer that divides the channel count."""
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise TypeError(f"heads: expected an integer, got {type(heads).__name__}")
    divides = heads > 0 and channels > 0 and channels % heads == 0
    checks.expect(divides, "heads", f"a divisor of {channels} channels", heads)
