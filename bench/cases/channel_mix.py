"""1×1 convolution, GELU and a BatchNorm in training."""

from __future__ import annotations

import math

import torch

from bench.cases.op import Draw, OpCases
from bench.cases.shapes import MAPS, Map
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find


def _sample(draw: Draw, shape: Map) -> Sample:
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


OPS = (OpCases(find("channel_mix"), _sample, MAPS),)
