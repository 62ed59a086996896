"""Gating along channels, as DeGMix has it, and along tokens, as gMLP does."""

from __future__ import annotations

import math
from functools import partial

import torch

from bench.cases.op import Draw, OpCases
from bench.cases.shapes import MAPS, TOKEN_MAPS, Map
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find


def _unit(draw: Draw, shape: Map, mode: str) -> Sample:
    tokens, channels = (shape.batch * shape.tasks, shape.pixels), shape.channels
    side = channels if mode == "channel" else shape.pixels
    arguments = {
        "u": draw(*tokens, channels),
        "v": draw(*tokens, channels),
        "norm_weight": draw(channels, dtype=torch.float32),
        "norm_bias": draw(channels, dtype=torch.float32),
        "weight": draw(side, side) / math.sqrt(side),
        "bias": draw(side),
        "mode": mode,
    }
    # In succession: of the LayerNorm, of the gate's product, over tokens of the parameters' gradients.
    return Sample(arguments, channels + side + math.prod(tokens))


def _mlp(draw: Draw, shape: Map) -> Sample:
    tokens, channels = (shape.batch * shape.tasks, shape.pixels), shape.channels
    hidden = channels  # as in DeGMix: fc1 makes 2C, u and v
    arguments = {
        "x": draw(*tokens, channels),
        "norm_weight": draw(channels, dtype=torch.float32),
        "norm_bias": draw(channels, dtype=torch.float32),
        "fc1_weight": draw(2 * hidden, channels) / math.sqrt(channels),
        "fc1_bias": draw(2 * hidden),
        "gate_norm_weight": draw(hidden, dtype=torch.float32),
        "gate_norm_bias": draw(hidden, dtype=torch.float32),
        "gate_weight": draw(hidden, hidden) / math.sqrt(hidden),
        "gate_bias": draw(hidden),
        "fc2_weight": draw(channels, hidden) / math.sqrt(hidden),
        "fc2_bias": draw(channels),
    }
    # In succession: of a LayerNorm and fc1, of another and the gate, of fc2; over tokens of gradients.
    return Sample(arguments, 2 * channels + 3 * hidden + math.prod(tokens))


OPS = (
    OpCases(find("spatial_gating_unit"), partial(_unit, mode="channel"), MAPS),
    # At maps of somebody's own the tokens may be too many for a matrix of tokens × tokens.
    OpCases(
        find("spatial_gating_unit"),
        partial(_unit, mode="token"),
        TOKEN_MAPS,
        suffix=" tokens",
        takes=lambda shape: False,
    ),
    OpCases(find("gated_mlp"), _mlp, MAPS),
)
