"""What a check compares, on problems small enough to see through."""

from __future__ import annotations

import pytest
import torch

from bench.cases import Problem, Run
from bench.check import Checker, CheckFailed
from bench.results import OURS


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
