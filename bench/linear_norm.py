"""A Linear and its LayerNorm, with a residual, of each task's tokens with parameters of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bench.cases import Case, Draw, op_case
from bench.shapes import MAPS, Map
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find

FAMILY = "linear_norm"


def _sample(shape: Map) -> Callable[[Draw], Sample]:
    def sample(draw: Draw) -> Sample:
        channels, size = shape.channels, (shape.batch * shape.tasks, shape.pixels, shape.channels)
        arguments = {
            "x": draw(*size),
            "weight": draw(shape.tasks, channels, channels) / math.sqrt(channels),
            "bias": draw(shape.tasks, channels),
            "norm_weight": draw(shape.tasks, channels, dtype=torch.float32),
            "norm_bias": draw(shape.tasks, channels, dtype=torch.float32),
            "residual": draw(*size),
        }
        # In succession: of the product, of the LayerNorm, over tokens of the parameters' gradients.
        return Sample(arguments, 2 * channels + shape.batch * shape.pixels)

    return sample


CASES: tuple[Case, ...] = tuple(
    op_case(FAMILY, find("linear_norm"), shape.name, _sample(shape)) for shape in MAPS
)
