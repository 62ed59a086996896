"""What a check compares, on problems small enough to see through."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from bench.harness.case import Problem, Run
from bench.harness.check import Checker, CheckFailed
from bench.harness.results import OURS


def scaled(factors: tuple[float, float], dtype: torch.dtype) -> Run:
    """The sum of two leaves; their gradients are wrong by these factors, the sum is not."""
    leaves = {name: torch.ones(3, dtype=dtype, requires_grad=True) for name in ("first", "last")}

    def forward() -> tuple[torch.Tensor, ...]:
        parts = [f * leaf - (f - 1) * leaf.detach() for f, leaf in zip(factors, leaves.values(), strict=True)]
        return (sum(parts),)

    return Run(forward, leaves, 0)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("factors", [(1.01, 1.0), (1.0, 1.01)], ids=["first", "last"])
def test_every_gradient_is_compared(factors: tuple[float, float], joint: bool) -> None:
    problem = Problem(
        exact=lambda: scaled((1.0, 1.0), torch.float64),
        runs={OURS: lambda: scaled(factors, torch.float32)},
        limit=lambda checker, gradients: 1e-3,
        dtype=torch.float32,
        joint=joint,
    )
    checker = Checker(problem, gradients=True)
    checker.check_ours(problem.runs[OURS](), gradients=False)
    with pytest.raises(CheckFailed, match="gradient"):
        checker.check_ours(problem.runs[OURS](), gradients=True)
    checker.check_ours(scaled((1.0, 1.0), torch.float32), gradients=True)


def test_a_run_that_does_not_fit_is_no_fault_of_the_reference() -> None:
    """Where the reference is a part, its gradients arrive in the shapes that a whole run has."""
    whole = scaled((1.0, 1.0), torch.float32)
    problem = Problem(
        exact=lambda: scaled((1.0, 1.0), torch.float64),
        runs={},
        limit=lambda checker, gradients: 1e-3,
        dtype=torch.float32,
        part=(slice(None),),
    )
    checker = Checker(problem, gradients=True)
    too_large = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        checker.check(replace(whole, forward=too_large), gradients=True)
    assert checker.check(whole, gradients=True) < 1e-6
