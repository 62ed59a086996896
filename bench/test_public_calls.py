"""pytest-benchmark: the public calls with whatever stands around the kernels, comparable between revisions.

    pytest --benchmark-only bench/ --benchmark-autosave
    pytest --benchmark-only bench/ --benchmark-compare

On a CPU at small sizes, where the references run; on a GPU at the sizes of NYUD-v2.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.cases import DTYPES, Case
from bench.measure import call_of
from bench.results import OURS
from bench.run import CASES
from bench.shapes import LAUNCH, NYUD, QUICK

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = (NYUD.name, f"{NYUD.name} b1", LAUNCH) if DEVICE.type == "cuda" else (QUICK,)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.shape in SHAPES],
    ids=lambda case: f"{case.op}-{case.shape}".replace(" ", "_"),
)
def test_call(case: Case, mode: str, dtype: str, benchmark: Callable[..., object]) -> None:
    if mode not in case.modes or dtype not in case.dtypes:
        pytest.skip(f"{case.op}, {case.shape} has no {mode} in {dtype}")
    problem = case.prepare(DEVICE, DTYPES[dtype])
    call = call_of(problem.runs[OURS](), mode, problem.dtype)

    def synchronised() -> None:
        call.step(call.prepare())
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=10, warmup_rounds=2)
