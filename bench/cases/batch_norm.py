"""Normalisation by statistics gathered elsewhere, and a residual."""

from __future__ import annotations

import torch

from bench.cases.op import Draw, OpCases
from bench.cases.shapes import MAPS, Map
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find


def _sample(draw: Draw, shape: Map) -> Sample:
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


OPS = (OpCases(find("batch_norm"), _sample, MAPS),)
