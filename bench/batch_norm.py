"""Normalisation by statistics gathered elsewhere, and a residual."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import Case, Draw, op_case
from bench.shapes import MAPS, Map
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find

FAMILY = "batch_norm"


def _sample(shape: Map) -> Callable[[Draw], Sample]:
    def sample(draw: Draw) -> Sample:
        size = (shape.batch, shape.channels, shape.height, shape.width)
        arguments = {
            "x": draw(*size),
            "mean": draw(shape.channels, dtype=torch.float32),
            "variance": draw(shape.channels, dtype=torch.float32).square() + 0.5,
            "weight": draw(shape.channels, dtype=torch.float32),
            "bias": draw(shape.channels, dtype=torch.float32),
            "residual": draw(*size),
        }
        return Sample(arguments, shape.batch * shape.pixels)

    return sample


CASES: tuple[Case, ...] = tuple(
    op_case(FAMILY, find("batch_norm"), shape.name, _sample(shape)) for shape in MAPS
)
