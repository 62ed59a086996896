"""A Linear and its LayerNorm, with a residual, of each task's tokens with parameters of its own."""

from __future__ import annotations

import math

import torch

from bench.cases.op import Draw, OpCases
from bench.cases.shapes import MAPS, Map
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find


def _sample(draw: Draw, shape: Map) -> Sample:
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


OPS = (OpCases(find("linear_norm"), _sample, MAPS),)
