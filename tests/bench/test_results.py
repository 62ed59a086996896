"""Result files: what is written is read back, anything else is refused, and nothing is left half written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import results
from bench.results import OURS, UNKNOWN, Ceilings, Machine, Results, Row, merge, newest, read, unused, write
from bench.tables import comparison_table, failures, op_tables

MACHINE = Machine(None, "a CPU", None, None, "2.11", "3.6", "3.12", None, "c" * 40, False)
ROW = Row("op", "nyud", "bf16", "fwd", OURS, "cpu clock", ms=2.0, ms_p20=1.0, ms_p80=3.0, bytes=10, flops=0)
MEASURED = Results(MACHINE, Ceilings(1e9, {"bf16": 1e12}), (ROW,))


def broken(path: Path, change: dict) -> Path:
    data = json.loads(path.read_text())
    data["rows"][0].update(change)
    path.write_text(json.dumps(data))
    return path


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "gpu" / "2026-01-02T0304-abc.json"
    write(MEASURED, path)
    assert read(path) == MEASURED
    assert newest(tmp_path) == path
    later = path.with_name("2026-01-03T0000-abc.json")
    write(MEASURED, later)
    assert newest(tmp_path) == later


def test_no_results(tmp_path: Path) -> None:
    assert newest(tmp_path) is None


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    row = Row("op", "nyud", "bf16", "fwd", OURS, rel_error=float("nan"), status="check failed: NaN")
    write(Results(MACHINE, Ceilings(None, {}), (row,)), path)
    assert read(path).rows[0].rel_error is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    write(MEASURED, path)

    def interrupted(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(Results(MACHINE, Ceilings(None, {}), ()), path)
    assert read(path) == MEASURED
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ms": "fast"}, r"rows\[0\].ms: expected float \| None, got 'fast'"),
        ({"op": None}, r"rows\[0\].op: expected str, got None"),
        ({"bytes": True}, r"rows\[0\].bytes: expected int \| None, got True"),
        ({"colour": 1}, r"unknown keys \['colour'\]"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "r.json"
    write(MEASURED, path)
    with pytest.raises(ValueError, match=message):
        read(broken(path, change))


def test_what_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected an object, got list"):
        read(path)


def test_tables_show_ratios_and_reasons() -> None:
    slow = Row("op", "nyud", "bf16", "fwd", "eager", "cpu clock", ms=5.0)
    absent = Row("op", "nyud", "bf16", "fwd", "other", status="not available: needs a GPU")
    (table,) = op_tables([ROW, slow, absent])
    assert "2.50×" in list(table.columns[3].cells)
    assert failures([ROW, slow, absent]) == ["op: other: not available: needs a GPU (1×)"]
    earlier = Results(MACHINE, MEASURED.ceilings, (Row(*ROW.case, OURS, "cpu clock", ms=3.0),))
    assert list(comparison_table(MEASURED, earlier, "then").columns[-1].cells) == ["1.50×"]


def test_runs_of_one_commit_are_merged() -> None:
    again, other = replace(ROW, ms=9.0), replace(ROW, impl="eager")
    clocks = replace(MACHINE, clocks="1980 MHz")
    now = Results(clocks, Ceilings(2e9, {"bf16": 2e12, "fp32": 3e12}), (again, other), complete=True)
    merged = merge(MEASURED, now)
    assert merged.rows == (ROW, other)
    assert merged.ceilings == Ceilings(1e9, {"bf16": 1e12, "fp32": 3e12})
    assert merged.keys == {("op", "nyud", "bf16", "fwd", OURS), ("op", "nyud", "bf16", "fwd", "eager")}
    assert not merged.complete
    for then, now, both in (
        ("1", "1", "1"),
        ("1", "2", "1 and 2"),
        ("1 and 2", "2", "1 and 2"),
        (None, None, None),
    ):
        before = replace(MEASURED, machine=replace(MACHINE, driver=then))
        assert merge(before, replace(MEASURED, machine=replace(MACHINE, driver=now))).machine.driver == both


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({}, {"commit": "d" * 40}, "commit was c"),
        ({}, {"torch": "2.15"}, "torch was 2.11 and is 2.15 now"),
        ({}, {"gpu": "a GPU"}, "gpu was None"),
        ({"dirty": True}, {"dirty": True}, "a known commit without changes"),
        ({"commit": UNKNOWN}, {"commit": UNKNOWN}, "a known commit without changes"),
    ],
)
def test_other_runs_are_not_merged(then: dict, now: dict, message: str) -> None:
    before = replace(MEASURED, machine=replace(MACHINE, **then))
    with pytest.raises(ValueError, match="what --quick measured"):
        merge(MEASURED, replace(MEASURED, quick=True))
    with pytest.raises(ValueError, match=message):
        merge(before, replace(MEASURED, machine=replace(MACHINE, **now)))


def test_no_file_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "2026-01-02T030405-abc.json"
    for name in (path.name, "2026-01-02T030405-abc-2.json", "2026-01-02T030405-abc-3.json"):
        assert unused(path).name == name
        write(MEASURED, unused(path))


def test_files_of_earlier_revisions_are_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write(replace(MEASURED, complete=True), path)
    assert read(path).complete
    data = json.loads(path.read_text())
    del data["complete"]
    path.write_text(json.dumps(data))
    assert not read(path).complete
