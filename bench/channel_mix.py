"""1×1 convolution, GELU and a BatchNorm in training."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bench.cases import Case, Draw, op_case
from bench.shapes import MAPS, Map
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find

FAMILY = "channel_mix"


def _sample(shape: Map) -> Callable[[Draw], Sample]:
    def sample(draw: Draw) -> Sample:
        channels = shape.channels
        arguments = {
            # Wide: with small z the activation is linear, and the bias' gradient cancels behind a BatchNorm.
            "x": draw(shape.batch, channels, shape.height, shape.width) * 4,
            "weight": draw(channels, channels, 1, 1) / math.sqrt(channels),
            "bias": draw(channels),
            "norm_weight": draw(channels, dtype=torch.float32),
            "norm_bias": draw(channels, dtype=torch.float32),
            "training": True,
        }
        # In succession: over channels in and, backward, channels out; over pixels of the statistics.
        return Sample(arguments, 2 * channels + shape.batch * shape.pixels)

    return sample


CASES: tuple[Case, ...] = tuple(
    op_case(FAMILY, find("channel_mix"), shape.name, _sample(shape)) for shape in MAPS
)
