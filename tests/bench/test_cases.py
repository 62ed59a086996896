"""Every case at its real shape, on tensors without data: what a GPU would meet in its first second."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import cases, model, task_attention
from bench.cases import DTYPES, Case
from bench.run import CASES
from bench.shapes import MAPS
from degmix.tasks import TASKS
from degmix_kernels.registry import find

META = torch.device("meta")
NOTICED = 1e-3  # relative error that a check in fp32 has to see; 1 % and everything above with it


class DrawMeta:
    """:class:`bench.cases.Draw` of shapes and dtypes alone."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=META)


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "Draw", DrawMeta)
    monkeypatch.setattr(model, "Draw", DrawMeta)


every_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.op} {case.shape} {[*case.modes]}"
)


@every_case
def test_every_case_can_be_prepared(case: Case) -> None:
    for dtype in case.dtypes:
        problem = case.prepare(META, DTYPES[dtype])
        assert tuple(problem.runs) == case.implementations
        for mode, work in problem.work.items():
            assert mode in case.modes
            assert work.bytes > 0


@pytest.mark.parametrize("case", [case for case in CASES if case.images is None], ids=lambda case: case.shape)
def test_the_check_of_every_op_sees_a_small_error(case: Case) -> None:
    assert case.prepare(META, torch.float32).limit(None, True) < NOTICED


@pytest.mark.parametrize("shape", MAPS, ids=lambda shape: shape.name)
def test_tasks_are_those_of_the_model(shape) -> None:
    assert set(shape.task_names) <= TASKS.keys()


def test_sdpa_in_chunks_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_attention, "CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 11, 8, generator=generator, dtype=torch.float64)
    expected = find("task_attention").reference(query, key, value, 2)
    torch.testing.assert_close(task_attention._sdpa(query, key, value, 2), expected)
