"""The benchmark's loop, on a CPU at small sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from bench.cases import recorded
from bench.cases.model import WHOLE
from bench.cases.op import Baseline, Draw, op_case
from bench.cases.recorded import Recorded
from bench.cases.registry import CASES, FAMILIES
from bench.cases.sdpa import sdpa_baselines
from bench.cases.shapes import QUICK
from bench.harness import measure
from bench.harness import run as loop
from bench.harness.case import COMPILED, EAGER, Case
from bench.harness.results import OK, OURS, Ceilings, Row
from bench.harness.run import DeviceLost, run
from bench.harness.run import _forget as forget
from bench.harness.selection import Selection
from degmix_kernels import registry
from degmix_kernels.contract import Op, Sample
from degmix_kernels.registry import find
from degmix_kernels.testing import tolerance

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def sample(draw: Draw) -> Sample:
    size = (2, 3, 4, 5)
    return Sample({"x": draw(*size), "mean": draw(3), "variance": draw(3).square() + 0.5}, 40)


def measured(*cases: Case, modes: tuple[str, ...] = ("fwd", "fwdbwd")) -> list[Row]:
    selection = Selection(cases, modes, ("fp32",), None, seconds=0)
    begun: list[Row] = []
    rows = [row for more in run(selection, CPU, Ceilings(1e9, {"fp32": 1e9}), begun.append) for row in more]
    assert [row.key for row in begun] == list(dict.fromkeys(row.key for row in rows))
    assert len(begun) == len(selection)
    return rows


def of(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if row.impl == name]


def test_rows_are_complete() -> None:
    rows = measured(op_case(find("batch_norm"), "tiny", sample), modes=("fwd", "bwd", "fwdbwd"))
    for row in of(rows, OURS) + of(rows, EAGER):
        assert row.status == OK
        assert row.timer == "cpu clock"
        assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
        assert row.runs >= measure.FEWEST
        assert 0 < row.rel_error < 1e-6
        assert row.speed_of_light == pytest.approx(max(row.bytes, row.flops) / 1e9 / (row.ms / 1e3))
        assert row.peak_bytes is None
    assert {row.status for row in of(rows, "torch.compile")} == {"not available: needs a GPU"}


def broken(change: Callable[[Tensor], Tensor]) -> Op:
    """``batch_norm`` with a mistake."""
    op = find("batch_norm")
    return replace(op, function=lambda **arguments: change(op.function(**arguments)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y * 1.001, "output: relative L2 error 1.000e-03"),
        # Twice of what fp32 may be off by, where a baseline may be off by half.
        (lambda y: y * (1 + 2 * tolerance(torch.float32, 40)), "output: relative L2 error"),
        (lambda y: torch.where(y == y.max(), torch.nan, y), "output: relative L2 error nan"),
        (lambda y: y[:1], "output: expected shape"),
    ],
)
def test_a_wrong_result_is_not_timed(change: Callable[[Tensor], Tensor], message: str) -> None:
    rows = measured(op_case(broken(change), "tiny", sample), modes=("fwd",))
    for row in of(rows, OURS):
        assert row.status.startswith(f"check failed: {message}")
        assert row.ms is None
    assert all(row.status == OK for row in of(rows, EAGER))


def test_a_wrong_gradient_is_not_timed() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return 2 * grad

    forward, both = of(measured(op_case(broken(Doubled.apply), "tiny", sample)), OURS)
    assert forward.status == OK
    assert both.status.startswith("check failed: gradient of")
    assert both.ms is None


def test_ours_is_checked_without_tf32_and_timed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch leaves it, which the tests do not."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen: dict[str, set[tuple[bool, ...]]] = {OURS: set(), EAGER: set()}

    def seeing(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(function)
        def call(**arguments: Tensor) -> Tensor:
            if arguments["x"].dtype == torch.float32:
                seen[name].add(tuple(setting.allow_tf32 for setting in settings))
            return function(**arguments)

        return call

    op = find("batch_norm")
    op = replace(op, function=seeing(OURS, op.function), reference=seeing(EAGER, op.reference))
    measured(op_case(op, "tiny", sample))
    assert seen == {OURS: {(False, False), (False, True)}, EAGER: {(False, True)}}


def test_a_failing_baseline_stops_nothing() -> None:
    raising = Mock(side_effect=RuntimeError("out of luck\nand a second line"))
    missing = Mock(side_effect=ImportError("no module of that name"))
    baselines = (
        Baseline("raises", lambda device: raising),
        Baseline("missing", missing),
        Baseline("wrong", lambda device: lambda x, **_: -x),
    )
    rows = measured(op_case(find("batch_norm"), "tiny", sample, baselines))
    assert {row.status for row in of(rows, "raises")} == {"failed: RuntimeError: out of luck"}
    assert {row.status for row in of(rows, "missing")} == {"failed: ImportError: no module of that name"}
    assert all(row.status.startswith("check failed") for row in of(rows, "wrong"))
    assert all(row.status == OK for row in of(rows, OURS))


def test_a_case_that_cannot_be_prepared_is_a_row() -> None:
    case = Case("test", "op", "huge", Mock(side_effect=MemoryError("too large")), (OURS, EAGER))
    assert {row.status for row in measured(case)} == {"failed: MemoryError: too large"}


def test_what_has_no_reference_is_not_timed() -> None:
    """The reference is tried once; of ours it is a failure, as nothing was checked."""
    huge = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    whole = op_case(find("batch_norm"), "huge", sample)
    case = replace(whole, prepare=lambda *where: replace(whole.prepare(*where), exact=huge))
    rows = measured(replace(case, implementations=(OURS, EAGER)))
    assert [row.impl for row in rows] == [OURS, OURS, EAGER, EAGER]
    assert {row.status for row in rows} == {"not checked: the fp64 reference does not fit"}
    assert all(row.failed and row.ms is None for row in rows)
    huge.assert_called_once()


def test_every_op_of_the_registry_is_measured() -> None:
    assert {op.label for op in registry.OPS} <= {case.op for case in CASES}
    folders = {path.parent.name for path in (ROOT / "degmix_kernels").glob("*/cases.py")}
    assert folders == set(FAMILIES) - {"model"}


@pytest.mark.parametrize("op", registry.OPS, ids=lambda op: op.label)
def test_an_op_without_a_file_of_cases_is_measured_by_its_record(
    op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "FEWEST", 1)
    quick, *real = Recorded(op).cases()
    assert quick.quick
    assert real, "nothing to measure on a GPU"
    rows = measured(quick)
    assert {row.status for name in (OURS, EAGER) for row in of(rows, name)} == {OK}


def test_what_is_drawn_for_a_record_is_what_its_samples_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the record's layout; a variance stays positive."""
    monkeypatch.setattr(recorded, "MOST_ELEMENTS", 2**14)
    _, case = Recorded(find("batch_norm")).cases()
    assert (case.shape, case.dtypes) == ("2x50x7x7", ("bf16",))
    leaves = case.prepare(CPU, torch.bfloat16).runs[OURS]().leaves
    assert leaves["x"].std().item() == pytest.approx(1, abs=0.1)
    assert leaves["variance"].min() >= 0.5
    assert leaves["variance"].unique().numel() > 10


def test_a_gpu_that_answers_no_more_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=lost))
    with pytest.raises(DeviceLost, match="illegal memory access"):
        forget()


def test_quick_on_a_gpu_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    case = op_case(find("batch_norm"), "tiny", sample)
    selection = Selection((case,), ("fwd",), ("fp32",), (COMPILED,), 0, quick=True)
    rows = [row for more in run(selection, torch.device("cuda"), Ceilings(None, {}), str) for row in more]
    assert [row.status for row in of(rows, COMPILED)] == ["not available: left out by --quick"]


def test_ours_is_measured_again_beside_later_baselines() -> None:
    """Once in a call, and only where it had a time."""
    cases = tuple(op_case(find("batch_norm"), shape, sample) for shape in ("one", "two"))
    everything = Selection(cases, ("fwd", "fwdbwd"), ("fp32",), None, 0)
    keys = sorted(filter(lambda key: key[-1] == OURS, everything.keys()))
    repeated = replace(everything, done=frozenset(keys), repeatable=frozenset(keys[1:]))
    rounds = [
        (case.shape, name, mode)
        for case, _, wanted in repeated.rounds()
        for name, modes in wanted.items()
        for mode in modes
    ]
    ours = [(shape, mode) for shape, name, mode in rounds if name == OURS]
    assert sorted(ours) == sorted((shape, mode) for _, shape, _, mode, _ in keys[1:])
    assert rounds.index(("two", OURS, "fwd")) < rounds.index(("two", EAGER, "fwd"))
    assert len(repeated) == len(everything) - 1
    assert not list(replace(everything, done=everything.keys(), repeatable=frozenset(keys)).rounds())


def test_memory_of_a_run_with_graphs_is_that_of_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are made once for all modes; where the twin fails, the times stay."""
    made: list[str] = []

    def loading(name: str) -> Callable[[torch.device], Callable[..., Tensor]]:
        return lambda device: made.append(name) or find("batch_norm").reference

    twin = Baseline("compiled", loading("graphs"), load_without_graphs=loading("plain"))
    problem = op_case(find("batch_norm"), "tiny", sample, (twin,)).prepare(CPU, torch.float32)
    run_of = problem.runs["compiled"]()
    row = Row("batch_norm", "tiny", "fp32", "fwd", "compiled", ms=1.0)
    monkeypatch.setattr(loop, "peak_bytes", lambda call, own_bytes: own_bytes)
    for mode in ("fwd", "fwdbwd"):
        assert loop._with_peak(row, run_of, mode, torch.float32).peak_bytes == run_of.own_bytes
    assert made == ["graphs", "plain"]
    failing = loop._with_peak(row, replace(run_of, without_graphs=lambda: 1 / 0), "fwd", torch.float32)
    assert failing.ms == 1.0
    assert failing.status == "peak memory: failed: ZeroDivisionError: division by zero"


def test_what_is_not_available_has_not_failed() -> None:
    row = Row("op", "quick", "fp32", "fwd", OURS)
    assert not row.failed
    assert not replace(row, status="not available: timm is not installed").failed
    assert replace(row, status="peak memory: failed: made up").failed


def test_compiled_models_come_last() -> None:
    """Where their compiler runs out of time, nothing is left behind them but backward passes alone."""
    everything = Selection(CASES, ("fwd", "fwdbwd"), ("bf16",), None, 0)
    ops = [(case.op, COMPILED in wanted) for case, _, wanted in everything.rounds()]
    first = ops.index((WHOLE, True))
    assert {op for op, _ in ops[first:]} == {WHOLE}
    assert ops.index((WHOLE, False)) < ops.index(("deform_mix", False))


def test_a_backend_that_refuses_is_not_available() -> None:
    """A CPU has no cuDNN; another error stays what it is."""
    (case,) = (case for case in CASES if (case.op, case.shape) == ("task_attention", QUICK))
    selection = Selection((case,), ("fwd",), ("fp32",), ("SDPA cudnn",), seconds=0)
    rows = [row for more in run(selection, CPU, Ceilings(None, {}), str) for row in more]
    (row,) = of(rows, "SDPA cudnn")
    assert row.status == "not available: this backend has no kernel for these shapes or this dtype"
    for baseline in sdpa_baselines(Mock(side_effect=RuntimeError("something else"))):
        with pytest.raises(RuntimeError, match="something else"):
            baseline.load(CPU)()
