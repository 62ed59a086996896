"""Softmax attention over tasks at each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from degmix_kernels import backend, checks, maps
from degmix_kernels.define import Positive, define
from degmix_kernels.launch import run
from degmix_kernels.task_attention import reference

if backend.HAS_TRITON:
    from degmix_kernels.task_attention import plan

MAX_TASKS = 8
MAX_HEAD_DIM = 1024  # of the kernels, in which a row of a head is one tile wide


class Call(NamedTuple):
    """Arguments of :func:`task_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    heads: Positive
    scale: float | None


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
        TypeError: for a wrong type, dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows DeGMix, arXiv 2308.05721, the task query block, as its published weights were trained.
    """
    call = op.checked(query, key, None if value is key else value, heads, scale)
    query, key, value, heads, _ = call
    checks.expect(query.dim() == 4, "query", "4 dimensions", query.shape)
    checks.expect(key.dim() == 4, "key", "4 dimensions", key.shape)
    batch, query_tasks, pixels, channels = query.shape
    tasks, key_channels = key.shape[1], key.shape[3]
    checks.expect(query_tasks > 0, "query", "at least one task on axis 1", query_tasks)
    checks.expect(channels > 0, "query", "at least one channel on axis 3", channels)
    check_heads(heads, channels)
    head_dim = channels // heads
    if not 1 <= tasks <= MAX_TASKS:
        checks.expect(False, "key", f"1 to {MAX_TASKS} tasks on axis 1", f"{tasks} tasks")
    if key_channels not in (channels, head_dim):
        own = f"{channels} channels on axis 3, or {head_dim} for all heads"
        checks.expect(False, "key", own, f"{key_channels} channels")
    checks.expect_shape("key", key, (batch, tasks, pixels, key_channels))
    checks.expect_shape("value", value, (batch, tasks, pixels, key_channels))
    missing = f"a head dimension above {MAX_HEAD_DIM}" if head_dim > MAX_HEAD_DIM else ""
    return op(call) if op.runs_triton(call, missing) else reference.task_attention(*call)


def check_heads(heads: int, channels: int) -> None:
    """Raise unless the number of heads divides that of channels."""
    if channels % heads:
        checks.expect(False, "heads", f"a divisor of {channels} channels", heads)


def _outputs(call: Call) -> Tensor:
    return maps.empty_contiguous(call.query)


def _readable(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    query, key, value, *_ = call
    return maps.readable(query), maps.readable(key), None if value is None else maps.readable(value)


def _scale(call: Call) -> float:
    return (call.query.shape[3] // call.heads) ** -0.5 if call.scale is None else call.scale


def _forward(call: Call, output: Tensor) -> None:
    run(plan.plan_forward(*_readable(call), output, call.heads, _scale(call)), output.device)


def _backward(
    call: Call, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Call
) -> dict[str, Tensor | None]:
    grad = maps.readable(grads[0])
    gradients = [
        maps.empty_contiguous(tensor) if want else None
        for tensor, want in zip(call[:3], wanted[:3], strict=True)
    ]
    launch = plan.plan_backward(grad, *_readable(call), *gradients, call.heads, _scale(call))
    run(launch, grad.device)
    return dict(zip(Call._fields, gradients, strict=False))


def _products(call: Call) -> int:
    """2 · 2 · B · N · S · T · heads · D: scores of S queries and T keys, and their weighted sums."""
    return 4 * call.query.numel() * call.key.shape[1]


op = define(
    "task_attention",
    Call,
    _outputs,
    _forward,
    _backward,
    products=_products,
    backward_products=2.5,
    like=maps.empty_contiguous,
)
