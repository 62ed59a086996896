"""Does a cap on the registers of a thread pay on Hopper GPUs, because a second program fits a multiprocessor?

Every op as the library launches it, without any cap, and with one on all of its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bench.cases.op import op_run
from bench.cases.registry import CASES
from bench.cases.shapes import NYUD
from bench.gpu.decide.common import BF16, capped
from bench.gpu.decide.meter import Meter
from bench.harness.case import SEED, Run
from bench.harness.measure import call_of
from bench.harness.results import OURS
from degmix_kernels.registry import OPS

CAPS: dict[str, int | None] = {"no cap": None, "128 registers": 128}
SHAPES = {  # op → the benchmark's shape
    "deform_conv2d (general)": "3x3 c256 56x56 b32 small",
    **dict.fromkeys(("deform_mix", "channel_mix", "linear_norm", "task_attention"), NYUD.name),
    **dict.fromkeys(("spatial_gating_unit", "gated_mlp", "gated_attention"), NYUD.name),
}


def rows(meter: Meter) -> None:
    """The section."""
    for name, run in _runs(meter):
        inference, both = call_of(run, "fwd", BF16), call_of(run, "bwd", BF16, keep=True)
        _rows(meter, f"{name} fwd", partial(inference.step, None))
        _rows(meter, f"{name} fwd, training", both.prepare)
        _rows(meter, f"{name} bwd", partial(both.step, both.prepare()))


def _runs(meter: Meter) -> Iterator[tuple[str, Run]]:
    """The calls of the benchmark; of tiny sizes the smallest of the contract tests."""
    for op in OPS if meter.dry else ():
        if op.label in SHAPES:
            samples = op.samples(meter.device, BF16, torch.Generator().manual_seed(SEED))
            smallest = min((each.arguments for each in samples), key=_elements)
            yield op.label, op_run(op, op.function, smallest)
    for case in () if meter.dry else CASES:
        if SHAPES.get(case.op) == case.shape:
            yield case.op, case.prepare(meter.device, BF16).runs[OURS]()


def _elements(arguments: dict[str, Any]) -> float:
    """How many a call has; very many if it is empty."""
    sizes = [each.numel() for each in arguments.values() if isinstance(each, Tensor)]
    return sum(sizes) if min(sizes) else math.inf


def _rows(meter: Meter, name: str, step: Callable[[], Any]) -> None:
    expected = cache(step)
    meter.row(name, "present", expected if meter.dry else step)
    for label, registers in CAPS.items():
        meter.row(name, label, capped(registers, step), expected=expected)
