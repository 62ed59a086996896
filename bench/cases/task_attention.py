"""Attention over the tasks at each pixel: T queries and T keys, heads of 128 channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bench.cases.op import Draw, OpCases
from bench.cases.sdpa import sdpa_baselines
from bench.cases.shapes import HEADS, MAPS, Map
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find

# Backends of SDPA put batch, heads or both on an axis of the grid that ends at 65 535.
CHUNK = 2**14


def _sample(draw: Draw, shape: Map) -> Sample:
    size = (shape.batch, shape.tasks, shape.pixels, shape.channels)
    arguments = {name: draw(*size) for name in ("query", "key", "value")}
    head_dim = shape.channels // HEADS
    return Sample(arguments | {"heads": HEADS}, max(head_dim, shape.tasks * HEADS))


def _sdpa(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """With the pixels on the batch axis, in chunks: what PyTorch offers for many small problems."""

    def split(tokens: Tensor) -> Tensor:  # (B, T, N, heads·D) → (B·N, heads, T, D)
        return tokens.unflatten(3, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)

    chunks = zip(*(split(tokens).split(CHUNK) for tokens in (query, key, value)), strict=True)
    attended = torch.cat([functional.scaled_dot_product_attention(*chunk) for chunk in chunks])
    return attended.unflatten(0, (query.shape[0], -1)).permute(0, 3, 1, 2, 4).flatten(3)


OPS = (OpCases(find("task_attention"), _sample, MAPS, sdpa_baselines(_sdpa)),)
