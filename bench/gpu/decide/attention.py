"""``gated_attention``: our kernels, or PyTorch's fused attention and the gate."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases.sdpa import BACKENDS
from bench.cases.shapes import NYUD
from bench.gpu.decide.common import BF16, backward, exact
from bench.gpu.decide.meter import Meter
from degmix_kernels import gated_attention
from degmix_kernels.attention import reference

NAMES = ("query", "key", "value", "gate")
FASTEST = ("SDPA cudnn", "SDPA flash")
# Batch, heads, queries, keys, channels of a head: the tokens of one task, and of one picture's four.
CALLS = ((4, 2, NYUD.pixels, NYUD.pixels, 128), (1, 2, NYUD.pixels, 4 * NYUD.pixels, 128))
SMALL = ((1, 1, 40, 70, 16),)
CHECKED = 256  # queries, of one head: the scores of more fit nowhere in fp64


def rows(meter: Meter) -> None:
    """The section."""
    for size in SMALL if meter.dry else CALLS:
        batch, heads, queries, keys, channels = size
        lengths = zip(NAMES, (queries, keys, keys, queries), strict=True)
        arguments = {  # heads inside the tokens
            name: torch.randn(batch, length, heads, channels, device=meter.device, dtype=BF16).transpose(1, 2)
            for name, length in lengths
        }
        _rows(meter, f"{batch} x {heads}, {queries} of {keys}", arguments)


def _rows(meter: Meter, size: str, arguments: dict[str, Tensor]) -> None:
    query, keys = arguments["query"], arguments["key"].shape[2]
    first = {
        name: tensor[:1, :1, : CHECKED if name in ("query", "gate") else None]
        for name, tensor in arguments.items()
    }
    checked = {"expected": cache(partial(exact, reference.gated_attention, first)), "reduction": keys}
    flops = 4 * query.numel() * keys
    names = FASTEST if meter.device.type == "cuda" else ("SDPA math",)
    functions = {name: partial(_sdpa, BACKENDS[name]) for name in names}

    name = f"attention fwd, {size}"
    saved = arguments | {"query": query.detach().requires_grad_()}
    meter.row(name, "present", torch.no_grad()(partial(gated_attention, **arguments)), flops=flops, **checked)
    meter.row(name, "present, saving for backward", partial(gated_attention, **saved), flops=flops, **checked)
    for label, function in functions.items():
        step = torch.no_grad()(partial(function, **arguments))
        meter.row(name, f"{label}, gate", step, flops=flops, **checked)

    name, grad = f"attention bwd, {size}", torch.randn_like(query)

    def gradients() -> list[Tensor | None]:
        """Those that the checked queries settle alone."""
        arriving = [grad[:1, :1, :CHECKED]]
        found = backward(reference.gated_attention, first, NAMES, arriving, torch.float64)()
        settled = ("query", "gate") if query.shape[2] > CHECKED else NAMES
        return [each if of in settled else None for of, each in zip(NAMES, found, strict=True)]

    checked["expected"] = cache(gradients)
    for label, function in {"present": gated_attention, **functions}.items():
        step = backward(function, arguments, NAMES, [grad])
        meter.row(name, label, step, flops=5 * flops // 2, **checked)


def _sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(query, key, value) * gate
