"""The benchmark's small cases on a GPU, real or fake (``-p fake_cuda``): no tensor is left on the CPU."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from bench.cases.registry import CASES
from bench.harness.case import DTYPES, SLOW_TO_START, Case, Unavailable
from bench.harness.check import Checker
from bench.harness.measure import call_of

QUICK = [case for case in CASES if case.quick]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, or a fake one: make test-full")
@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.op}, {case.shape}")
def test_every_implementation_is_checked_and_steps(case: Case, device: torch.device) -> None:
    assert device.type == "cuda"
    checker = Checker(case.prepare(device, DTYPES["fp32"]), gradients=True)
    for name in case.implementations:
        if name not in SLOW_TO_START:
            with suppress(Unavailable):
                made = checker.problem.runs[name]()
                checker.check(made, True)
                for mode in case.modes:
                    call = call_of(made, mode, checker.problem.dtype)
                    call.step(call.prepare())
