"""Offsets that are the same for every image, added to one task's."""

from __future__ import annotations

import torch

from bench.cases.op import Draw, OpCases
from bench.cases.shapes import MAPS, Map
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find


def _sample(draw: Draw, shape: Map) -> Sample:
    channels, height, width = shape.channels, shape.height, shape.width
    arguments = {
        "x": draw(shape.batch, 2 * channels, height, width),
        "rows": draw(1, channels, height, 3, dtype=torch.float32),
        "columns": draw(1, channels, 3, width, dtype=torch.float32),
    }
    return Sample(arguments, shape.batch * max(height, width))


OPS = (OpCases(find("coordinate_bias"), _sample, MAPS),)
