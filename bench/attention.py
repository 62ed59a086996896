"""Attention over all tokens of a map: with softmax and a gate, and without softmax."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from bench.cases import Baseline, Case, Draw, op_case
from bench.sdpa import sdpa_baselines
from bench.shapes import HEADS, MAPS, Map
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find

FAMILY = "attention"

# One picture and head: the fp64 reference of more forms matrices that fit nowhere.
PART = (slice(0, 1), slice(0, 1))


def _size(shape: Map) -> tuple[int, int, int, int]:
    return shape.batch, HEADS, shape.pixels, shape.channels // HEADS


def _gated(shape: Map) -> Callable[[Draw], Sample]:
    def sample(draw: Draw) -> Sample:
        size = _size(shape)
        arguments = {name: draw(*size) for name in ("query", "key", "value", "gate")}
        return Sample(arguments, max(size[2:]))

    return sample


def _linear(shape: Map) -> Callable[[Draw], Sample]:
    def sample(draw: Draw) -> Sample:
        size = _size(shape)
        arguments = {name: draw(*size) for name in ("query", "key", "value")}
        return Sample(arguments | {"scale": size[3] ** -0.5}, max(size[2:]))

    return sample


def _gated_sdpa(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value) * gate


def _matmuls(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return query @ (key.transpose(-2, -1) @ value * scale)


CASES: tuple[Case, ...] = (
    *(
        op_case(
            FAMILY,
            find("gated_attention"),
            shape.name,
            _gated(shape),
            sdpa_baselines(_gated_sdpa),
            PART,
        )
        for shape in MAPS
    ),
    *(
        op_case(
            FAMILY,
            find("linear_attention"),
            shape.name,
            _linear(shape),
            (Baseline("two products", lambda device: _matmuls),),
            PART,
        )
        for shape in MAPS
    ),
)
