"""Attention over all tokens of a map: with softmax and a gate, and without softmax."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from bench.cases.op import Baseline, Draw, OpCases
from bench.cases.sdpa import sdpa_baselines
from bench.cases.shapes import HEADS, MAPS, Map
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find

# One picture and head: the fp64 reference of more forms matrices that fit nowhere.
PART = (slice(0, 1), slice(0, 1))


def _size(shape: Map) -> tuple[int, int, int, int]:
    return shape.batch, HEADS, shape.pixels, shape.channels // HEADS


def _gated(draw: Draw, shape: Map) -> Sample:
    size = _size(shape)
    arguments = {name: draw(*size) for name in ("query", "key", "value", "gate")}
    return Sample(arguments, max(size[2:]))


def _linear(draw: Draw, shape: Map) -> Sample:
    size = _size(shape)
    arguments = {name: draw(*size) for name in ("query", "key", "value")}
    return Sample(arguments | {"scale": size[3] ** -0.5}, max(size[2:]))


def _gated_sdpa(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value) * gate


def _matmuls(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return query @ (key.transpose(-2, -1) @ value * scale)


OPS = (
    OpCases(find("gated_attention"), _gated, MAPS, sdpa_baselines(_gated_sdpa), PART),
    OpCases(
        find("linear_attention"), _linear, MAPS, (Baseline("two products", lambda device: _matmuls),), PART
    ),
)
