"""Calls of attention over all tokens: what the contract tests run, what the compile check compiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from degmix_kernels.attention import reference
from degmix_kernels.attention.linear_op import linear_attention, linear_op
from degmix_kernels.attention.module import GatedAttention, LinearAttention
from degmix_kernels.attention.op import gated_attention, gated_op
from degmix_kernels.contract import Op, Sample, Shape

# batch, heads, queries, keys, head_dim, gate, residual
_CALLS = (
    (2, 2, 9, 7, 5, True, True),
    (1, 1, 1, 17, 3, False, True),
    (3, 2, 5, 1, 1, True, False),
    (0, 2, 4, 4, 4, True, True),
    (1, 3, 33, 33, 8, False, False),
)


def _tensors(shape: tuple, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict:
    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(device)

    batch, heads, queries, keys, head_dim, gate, residual = shape
    return {
        "query": draw(batch, heads, queries, head_dim),
        "key": draw(batch, heads, keys, head_dim),
        "value": draw(batch, heads, keys, head_dim),
        "gate": draw(batch, heads, queries, head_dim) if gate else None,
        "residual": draw(batch, heads, queries, head_dim) if residual else None,
    }


def _terms_of_one_key(arguments: Mapping[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """A score's gradient is grad · value minus its mean over the keys. With one key, the two are the same."""
    query, key, value, gate = (arguments[name].double() for name in ("query", "key", "value", "gate"))
    grad_scores = (grad.double() * gate * value).sum(-1, keepdim=True) * query.shape[3] ** -0.5
    return {"query": grad_scores * key, "key": grad_scores * query}


def _gated_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for shape in _CALLS:
        terms = _terms_of_one_key if shape[3] == 1 else None
        arguments = _tensors(shape, device, dtype, generator)
        samples.append(Sample(arguments, max(shape[2], shape[3], shape[4]), terms=terms))
    return samples


def _linear_samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for shape in _CALLS:
        tensors = _tensors((*shape[:5], False, False), device, dtype, generator)
        arguments = {name: tensors[name] for name in ("query", "key", "value")} | {"scale": shape[4] ** -0.5}
        samples.append(Sample(arguments, max(shape[2], shape[3], shape[4])))
    return samples


def _tokens(batch: int, length: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """(B, heads, N, D), heads inside the tokens, as a module splits them."""
    return torch.empty(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)


def _gated_shapes(dtype: torch.dtype) -> Iterator[Shape]:
    """DeGMix on NYUD-v2, 4 tasks of 107×140 tokens, and other heads, whole and ragged; heads outside."""
    # batch, heads, queries, keys, head_dim
    calls = [(8, 2, 107 * 140, 4 * 107 * 140, 128), (8, 4, 4096, 4096, 64), (2, 6, 700, 700, 40)]
    if dtype == torch.bfloat16:  # the second has more than 2³¹ elements
        calls += [
            (2, 3, 33, 65, 5),
            (64, 4, 65536 + 64, 65536 + 64, 128),
            (8, 2, 128 * 128, 5 * 128 * 128, 128),
        ]
    if dtype == torch.float16:  # the code of bf16 but for conversions
        calls = calls[:1]
    names = ("query", "key", "value", "gate", "residual")
    for batch, heads, queries, keys, head_dim in calls:
        lengths = (queries, keys, keys, queries, queries)
        tensors = (_tokens(batch, length, heads, head_dim, dtype) for length in lengths)
        yield Shape(dict(zip(names, tensors, strict=True)))
    # Heads outside and no residual: the one call that is capped on Hopper.
    yield Shape({name: torch.empty(8, 2, 107 * 140, 128, dtype=dtype) for name in names[:4]})


def _linear_shapes(dtype: torch.dtype) -> Iterator[Shape]:
    """DeGMix on NYUD-v2, 4 tasks of 107×140 tokens, and other heads, whole and ragged."""
    calls = [(8, 4 * 107 * 140, 2, 128)]  # batch, tokens, heads, head_dim
    if dtype == torch.bfloat16:  # the last has more than 2³¹ elements
        calls += [(2, 700, 6, 40), (2, 33, 3, 5), (64, 65536 + 64, 4, 128)]
    for call in calls:
        tensors = {name: _tokens(*call, dtype) for name in ("query", "key", "value")}
        yield Shape(tensors | {"scale": call[-1] ** -0.5})


OPS = (
    Op(
        op=gated_op,
        function=gated_attention,
        reference=reference.gated_attention,
        module=GatedAttention,
        samples=_gated_samples,
        shapes=_gated_shapes,
        batched=("query", "key", "value", "gate", "residual"),
        backward_reads=("query", "key", "value", "gate"),
    ),
    Op(
        op=linear_op,
        function=linear_attention,
        reference=reference.linear_attention,
        module=LinearAttention,
        samples=_linear_samples,
        shapes=_linear_shapes,
        batched=("query", "key", "value"),
        backward_reads=("query", "key", "value"),
    ),
)
