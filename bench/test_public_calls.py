"""pytest-benchmark: the public calls with whatever stands around the kernels, comparable between revisions.

    pytest --benchmark-only bench/ --benchmark-autosave
    pytest --benchmark-only bench/ --benchmark-compare

On a CPU at small sizes, where the references run; on a GPU at the sizes of NYUD-v2 and at small ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.cases.registry import CASES, everything
from bench.cases.shapes import LAUNCH
from bench.harness.case import DTYPES, Case
from bench.harness.measure import call_of
from bench.harness.results import OURS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cuda":
    CASES_HERE = (*everything().headline().cases, *(case for case in CASES if case.shape == LAUNCH))
else:
    CASES_HERE = tuple(case for case in CASES if case.quick)
CALLS = [
    pytest.param(case, mode, dtype, id=f"{case.op}-{case.shape}-{case.modes[mode]}-{dtype}".replace(" ", "_"))
    for case in CASES_HERE
    for mode in ("fwd", "fwdbwd")
    if mode in case.modes
    for dtype in ("bf16", "fp32")
    if dtype in case.dtypes
]


@pytest.mark.parametrize(("case", "mode", "dtype"), CALLS)
def test_call(case: Case, mode: str, dtype: str, benchmark: Callable[..., object]) -> None:
    problem = case.prepare(DEVICE, DTYPES[dtype])
    call = call_of(problem.runs[OURS](), mode, problem.dtype)

    def synchronised() -> None:
        call.step(call.prepare())
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=10, warmup_rounds=2)
