"""Every kind of launch of the gate and the gated MLP, on meta tensors: what the compile check compiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from degmix_kernels.gating.backward_plan import plan_gate_backward, plan_norm_backward, plan_token_weight
from degmix_kernels.gating.plan import (
    plan_linear,
    plan_mix_tokens,
    plan_normalise,
    wants_statistics,
)
from degmix_kernels.launch import Launch

_EPS = 1e-5

# batch, tokens, channels, hidden, mode
_DEGMIX = (32, 107 * 140, 256, 256, "channel")  # batch 8, four tasks, NYUD-v2
_GMLP = (64, 196, 192, 384, "token")
_MORE = (
    (2, 49, 50, 70, "channel"),
    (1, 60, 40, 5000, "channel"),  # rows wider than a tile
    (32, 640 * 640, 256, 256, "channel"),  # more than 2³¹ elements
    (16, 8192, 256, 16384, "token"),
)


def gate_examples(dtype: torch.dtype) -> list[Launch]:
    """Launches of ``spatial_gating_unit``; ``gated_mlp`` has the same kernels at more sizes."""
    return [launch for call in (_DEGMIX, _GMLP) for launch in _gate(call, dtype, "identity")]


def mlp_examples(dtype: torch.dtype) -> list[Launch]:
    """Launches of ``gated_mlp``."""
    calls = [_DEGMIX, _GMLP]
    if dtype == torch.float16:  # the code of bf16 but for conversions
        calls = [_DEGMIX]
    if dtype == torch.bfloat16:
        calls += _MORE
    return [launch for call in calls for launch in _mlp(call, dtype)]


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm(size: int) -> tuple[Tensor, Tensor, float]:
    vector = _empty(size, dtype=torch.float32)
    return vector, vector, _EPS


def _gate(call: tuple[int, int, int, int, str], dtype: torch.dtype, activation: str) -> Iterator[Launch]:
    batch, tokens, _, hidden, mode = call
    empty = partial(_empty, dtype=dtype)
    u, v = empty(batch, tokens, 2 * hidden).chunk(2, dim=2)
    size = hidden if mode == "channel" else tokens
    weight, bias, norm, matrix = empty(size, size), empty(size), _norm(hidden), empty(batch, tokens, hidden)
    statistics = _empty(2, batch * tokens, dtype=torch.float32)
    if mode == "token":
        yield plan_mix_tokens(weight, matrix, bias, u, matrix)
        yield plan_token_weight(matrix, matrix)[0]
    else:
        given = statistics if wants_statistics(v, hidden) else None
        yield plan_linear(v, weight, bias, norm, given, multiplier=u, output=matrix)
        if given is not None:
            yield plan_normalise(v, *norm, "identity", statistics, None)
    yield plan_normalise(v, *norm, activation, None, matrix)
    yield plan_gate_backward(
        matrix, weight, bias, u, mode, activation, matrix, matrix, matrix, u, True, True
    )[0]
    yield from plan_norm_backward(matrix, v, norm, activation, None, v, None, True)[0]


def _mlp(call: tuple[int, int, int, int, str], dtype: torch.dtype) -> Iterator[Launch]:
    batch, tokens, channels, hidden, _ = call
    empty = partial(_empty, dtype=dtype)
    x, pre = empty(batch, tokens, channels), empty(batch, tokens, 2 * hidden)
    norm = _norm(channels)
    weight, bias = empty(2 * hidden, channels), empty(2 * hidden)
    statistics = None
    if wants_statistics(x, 2 * hidden):
        statistics = _empty(2, batch * tokens, dtype=torch.float32)
        yield plan_normalise(x, *norm, "identity", statistics, None)
    yield plan_linear(x, weight, bias, norm, statistics, "gelu", pre=pre, output=pre)
    yield plan_linear(x, weight, bias, norm, statistics, "gelu", output=pre)  # in inference
    yield plan_linear(x, weight, bias, norm, statistics, pre=pre)
    gated = empty(batch, tokens, hidden)
    yield plan_linear(gated, empty(channels, hidden), empty(channels), residual=x, output=x)
    yield from _gate(call, dtype, "gelu")
    yield from plan_norm_backward(x, x, norm, "identity", x, x, x, True)[0]
