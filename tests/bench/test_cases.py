"""Every case at its real shape, on tensors without data: what a GPU would meet in its first second."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.cases import model, op, task_attention
from bench.cases.recorded import Recorded
from bench.cases.registry import CASES
from bench.cases.shapes import MAPS
from bench.harness.case import COMPILED, DEFORMOPS, DTYPES, MODES, Case
from bench.harness.selection import Selection
from degmix.tasks import TASKS
from degmix_kernels.registry import OPS, find

META = torch.device("meta")
NOTICED = 1e-3  # relative error that a check in fp32 has to see; 1 % and everything above with it


class DrawMeta:
    """:class:`bench.harness.case.Draw` of shapes and dtypes alone."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=META)


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "Draw", DrawMeta)
    monkeypatch.setattr(model, "Draw", DrawMeta)


RECORDED = [case for op in OPS for case in Recorded(op).cases()]  # as of ops that have no file of cases


@pytest.mark.parametrize(
    "case", [*CASES, *RECORDED], ids=lambda case: f"{case.op} {case.shape} {[*case.modes]}"
)
def test_every_case_can_be_prepared(case: Case) -> None:
    for dtype in case.dtypes:
        problem = case.prepare(META, DTYPES[dtype])
        assert tuple(problem.runs) == case.implementations
        for mode, work in problem.work.items():
            assert mode in case.modes
            assert work.bytes > 0


@pytest.mark.parametrize(
    "case",
    [case for case in (*CASES, *RECORDED) if case.images is None and "fp32" in case.dtypes],
    ids=lambda case: f"{case.op} {case.shape}",
)
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


def test_what_matters_most_is_measured_first() -> None:
    real = tuple(case for case in CASES if not case.quick)
    order = [
        (case, dtype, names, {mode for modes in names.values() for mode in modes})
        for case, dtype, names in Selection(real, MODES, ("fp32", "bf16"), None, 0).rounds()
    ]
    shapes = [(case.shape, dtype) for case, dtype, *_ in order]
    assert shapes[:4] == [*[("nyud b1", "bf16")] * 2, *[("nyud b8", "bf16")] * 2]
    leading = next(place for place, (shape, _) in enumerate(shapes) if shape == "pascal b1")
    assert {case.op for case, *_ in order[:leading]} == {case.op for case in CASES}
    compiled = next(place for place, (_, _, names, _) in enumerate(order) if COMPILED in names)
    assert compiled > leading
    assert compiled <= next(place for place, (_, _, names, _) in enumerate(order) if DEFORMOPS in names)
    assert {dtype for _, dtype in shapes[:compiled]} == {"bf16", "fp32"}
    assert [shape for shape, _ in shapes[compiled : compiled + 2]] == ["nyud b1"] * 2
    alone = next(place for place, (*_, modes) in enumerate(order) if "bwd" in modes)
    assert all(modes == {"bwd"} for *_, modes in order[alone:])
    everything = Selection(real, MODES, ("fp32", "bf16"), None, 0)
    headline = everything.headline().keys()
    assert headline < everything.keys()
    assert {op for op, *_ in headline} == {case.op for case in CASES}
    assert {dtype for _, _, dtype, *_ in headline} == {"bf16"}
    assert not {COMPILED, DEFORMOPS} & {name for *_, name in headline}
    rest = replace(everything, done=frozenset(list(everything.keys())[:100]))
    assert len(rest) == len(everything) - 100
    assert not rest.keys() & rest.done


def test_every_small_op_is_timed_without_and_with_its_launches() -> None:
    ops = [case for case in CASES if case.family != model.FAMILY]
    small = {case.timers for case in ops if case.shape.split()[0] in ("launch", "quick")}
    assert small == {("cuda graph", "cuda loop")}
    models = {case.timers for case in CASES if case.family == model.FAMILY and case.quick}
    assert models == {("cuda events", "cuda loop")}
