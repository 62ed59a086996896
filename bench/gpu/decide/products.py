"""Weight gradients, which sum over all pixels: one product, or chunks of them; padded maps, or tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from bench.gpu.decide.common import BF16, FP32, product
from bench.gpu.decide.meter import Meter
from degmix_kernels.maps import ceil_div

# Products, rows, columns, terms, and into how many chunks these are cut.
TOKENS = ((1, 256, 256, 479360, (8, 32)), (1, 512, 256, 479360, (8, 32)), (4, 256, 512, 119840, (2, 8)))
MAPS = ((32, 256, 256, 14980), (8, 1024, 256, 14980))
FEW_TOKENS, FEW_MAPS = ((1, 16, 16, 64, (2, 4)), (2, 16, 32, 64, (2,))), ((2, 16, 32, 60),)
PADDED_TO = 64


def rows(meter: Meter) -> None:
    """The section."""
    draw = partial(torch.randn, device=meter.device, dtype=BF16)
    for batch, m, n, terms, chunks in FEW_TOKENS if meter.dry else TOKENS:
        left, right = draw(batch, terms, m), draw(batch, terms, n)
        name = f"tokens, {batch} x {m} x {n}, K {terms}"
        steps = {"present, bf16 result": lambda left=left, right=right: left.mT @ right}
        steps["fp32 result"] = partial(product, left.mT, right)
        for count in chunks:
            steps[f"{count} chunks, summed in fp32"] = partial(in_chunks, left, right, count)
        _rows(meter, name, steps, left.mT, right)
    for batch, m, n, terms in FEW_MAPS if meter.dry else MAPS:
        left, right = draw(batch, m, terms), draw(batch, n, terms)
        name = f"maps, {batch} x {m} x {n}, K {terms}"
        steps = {"present, bf16 result": lambda left=left, right=right: left @ right.mT}
        steps["fp32 result"] = partial(product, left, right.mT)
        padding = (0, ceil_div(terms, PADDED_TO) * PADDED_TO - terms)
        padded = [torch.nn.functional.pad(each, padding) for each in (left, right)]
        steps[f"pixels padded to {PADDED_TO}, fp32 result"] = partial(product, padded[0], padded[1].mT)
        tokens = [each.mT.contiguous() for each in (left, right)]
        steps["tokens, fp32 result"] = partial(product, tokens[0].mT, tokens[1])
        _rows(meter, name, steps, left, right.mT)


def in_chunks(left: Tensor, right: Tensor, count: int) -> Tensor:
    """``leftᵀ @ right`` of tokens, as products of ``count`` chunks of them."""
    left, right = (each.unflatten(1, (count, -1)).flatten(0, 1) for each in (left, right))
    return product(left.mT, right).unflatten(0, (-1, count)).sum(1, dtype=FP32).to(BF16)


def _rows(meter: Meter, name: str, steps: dict[str, Callable], left: Tensor, right: Tensor) -> None:
    expected = cache(lambda: left[:1].double() @ right[:1].double())
    flops = 2 * left.numel() * right.shape[2]
    for variant, step in steps.items():
        meter.row(name, variant, step, expected=expected, reduction=left.shape[2], flops=flops)
