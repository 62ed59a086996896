"""Offsets that are the same for every image, added to one task's."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import Case, Draw, op_case
from bench.shapes import MAPS, Map
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find

FAMILY = "coordinate_bias"


def _sample(shape: Map) -> Callable[[Draw], Sample]:
    def sample(draw: Draw) -> Sample:
        channels, height, width = shape.channels, shape.height, shape.width
        arguments = {
            "x": draw(shape.batch, 2 * channels, height, width),
            "rows": draw(1, channels, height, 3, dtype=torch.float32),
            "columns": draw(1, channels, 3, width, dtype=torch.float32),
        }
        return Sample(arguments, shape.batch * max(height, width))

    return sample


CASES: tuple[Case, ...] = tuple(
    op_case(FAMILY, find("coordinate_bias"), shape.name, _sample(shape)) for shape in MAPS
)
