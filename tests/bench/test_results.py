"""Result files: what is written is read back, anything else is refused, and nothing is left half written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.results import (
    OURS,
    UNKNOWN,
    Ceilings,
    Machine,
    Part,
    Results,
    Row,
    begin,
    continue_,
    end,
    publish,
    read,
    unused,
    with_unended,
    write,
)
from bench.speedups import comparisons
from bench.tables import compared_with, comparison_table, failures, op_tables
from degmix import files

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
    machine = replace(MACHINE, tf32={"matmul": False, "cudnn": True})
    whole = replace(MEASURED, measured="2026-01-02T03:04:05", continued=(Part(machine, MEASURED.ceilings),))
    for results in (MEASURED, whole.with_rows((ROW,))):
        write(results, path)
        assert read(path) == results


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

    monkeypatch.setattr(files.os, "replace", interrupted)
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
        ({"colour": 1}, r"rows\[0\]: missing keys \[\], unknown keys \['colour'\]"),
        ({"part": 1}, r"rows\[0\].part: there is no part 1"),
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
    path.write_bytes(b"\xff\xd8")  # a picture
    with pytest.raises(ValueError, match=r"r\.json: not JSON: 'utf-8' codec"):
        read(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected an object, got list"):
        read(path)


def test_tables_show_ratios_and_reasons() -> None:
    slow = Row("op", "nyud", "bf16", "fwd", "eager", "cpu clock", ms=5.0)
    absent = Row("op", "nyud", "bf16", "fwd", "other", status="not available: needs a GPU")
    (table,) = op_tables([ROW, slow, absent])
    assert "2.50×" in list(table.columns[3].cells)
    wrong = replace(ROW, timer=None, ms=None, status="check failed: far off")
    (table,) = op_tables([replace(ROW, speed_of_light=0.25), replace(wrong, impl="wrong")])
    assert "WRONG" in list(table.columns[1].cells)
    assert "25" in list(table.columns[5].cells)
    assert failures([ROW, slow, absent]) == ["op: other: not available: needs a GPU (1×)"]
    earlier = Results(MACHINE, MEASURED.ceilings, (Row(*ROW.case, OURS, "cpu clock", ms=3.0),))
    assert list(comparison_table(MEASURED, earlier, "then").columns[-1].cells) == ["1.50×"]


def test_comparisons_tell_noise_and_machines() -> None:
    """Ours took 1 to 3 ms."""
    for low, high, shown in ((3.0, 5.0, "no difference"), (0.5, 1.0, "no difference"), (3.5, 5.0, "2.00×")):
        then = replace(ROW, ms=4.0, ms_p20=low, ms_p80=high)
        table = comparison_table(MEASURED, replace(MEASURED, rows=(then,)), "then")
        assert list(table.columns[-1].cells) == [shown]
    there = replace(MACHINE, gpu="a GPU", triton="3.9", commit="d" * 40)
    line = compared_with(MEASURED, replace(MEASURED, machine=there), "HEAD~1")
    assert line.startswith("HEAD~1 was measured on a GPU, torch 2.11, Python 3.12, triton 3.9, commit ddd")
    assert line.endswith(". Not only the code is another now: device, triton")
    assert "another" not in compared_with(MEASURED, MEASURED, "HEAD")


def test_a_run_of_one_commit_is_continued() -> None:
    """On another machine of the same kind; a ratio is one of times of the same call."""
    there = Part(replace(MACHINE, clocks="1980 MHz", driver="2"), Ceilings(2e9, {"fp32": 3e12}), "later")
    both = continue_(MEASURED, there)
    assert both.parts == (Part(MACHINE, MEASURED.ceilings), there)
    assert both.rows == (ROW,)
    eager = replace(ROW, impl="eager", ms=9.0)
    alone, both = both.with_rows((eager,)), both.with_rows((replace(ROW, ms=3.0), eager))
    assert [row.part for row in both.rows] == [0, 1, 1]
    (call,) = comparisons(both.rows)
    assert call.ours == ROW
    assert [call.speed_up(other) for other in call.others] == [3.0]
    (call,) = comparisons(alone.rows)
    assert [call.speed_up(other) for other in call.others] == [None]
    for rows, shown in ((both.rows, ["", "", "", "3.00×"]), (alone.rows, ["", "", ""])):
        (table,) = op_tables(rows)
        assert list(table.columns[3].cells) == shown


def test_what_was_killed_is_a_failed_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    begin(ROW.key, path)
    write(replace(MEASURED, rows=()), path)
    (row,) = with_unended(read(path), path).rows
    assert row.key == ROW.key
    assert row.status == "failed: the process was killed meanwhile"
    assert MEASURED.repeatable == {ROW.key}
    assert not with_unended(MEASURED, path).repeatable  # as the last time it was killed
    end(path)
    end(path)
    assert with_unended(MEASURED, path) == MEASURED
    for wrong in ("{", "[1, 2]", '["op", "nyud", "bf16", "fwd", 1]'):
        path.with_name("r.json.begun").write_text(wrong)
        with pytest.raises(ValueError, match="delete it to go on"):
            with_unended(MEASURED, path)


def test_only_whole_runs_on_a_gpu_are_published(tmp_path: Path) -> None:
    file, when = tmp_path / "results.json", "2026-01-02T03:04:05"
    whole = replace(MEASURED, machine=replace(MACHINE, gpu="NVIDIA H200"), complete=True, measured=when)
    for results in (
        replace(whole, complete=False),
        replace(whole, measured=""),
        replace(whole, machine=MACHINE),
        replace(whole, machine=replace(whole.machine, dirty=True)),
        replace(whole, machine=replace(whole.machine, commit=UNKNOWN)),
    ):
        write(results, file)
        with pytest.raises(ValueError, match=r"expected (a complete run|the run of a known)"):
            publish(file, results, tmp_path / "results")
        assert file.exists()
    for name in ("2026-01-02T030405-cccccccccc.json", "2026-01-02T030405-cccccccccc-2.json"):
        write(whole, file)
        assert publish(file, whole, tmp_path / "results") == tmp_path / "results" / "nvidia-h200" / name
        assert not file.exists()


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({}, {"commit": "d" * 40}, "commit was c"),
        ({}, {"torch": "2.15"}, "torch was 2.11 and is 2.15 now"),
        ({}, {"triton": "3.9"}, "triton was 3.6"),
        ({}, {"gpu": "a GPU"}, "gpu was None"),
        ({}, {"tf32": {"matmul": True, "cudnn": True}}, "tf32 was None"),
        ({"dirty": True}, {"dirty": True}, "a known commit without changes"),
        ({"commit": UNKNOWN}, {"commit": UNKNOWN}, "a known commit without changes"),
    ],
)
def test_other_runs_are_not_continued(then: dict, now: dict, message: str) -> None:
    before = replace(MEASURED, machine=replace(MACHINE, **then))
    with pytest.raises(ValueError, match="what --quick measured"):
        continue_(replace(MEASURED, quick=True), Part(MACHINE, MEASURED.ceilings))
    with pytest.raises(ValueError, match=message):
        continue_(before, Part(replace(MACHINE, **now), MEASURED.ceilings))


def test_no_file_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "2026-01-02T030405-abc.json"
    for name in (path.name, "2026-01-02T030405-abc-2.json", "2026-01-02T030405-abc-3.json"):
        assert unused(path).name == name
        write(MEASURED, unused(path))


def test_files_of_earlier_revisions_say_less(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write(replace(MEASURED, complete=True), path)
    data = json.loads(path.read_text())
    for name in ("complete", "quick", "measured", "continued"):
        del data[name]
    del data["machine"]["tf32"], data["rows"][0]["part"]
    path.write_text(json.dumps(data))
    assert read(path) == MEASURED
    del data["machine"]["commit"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"r.json: machine: missing keys \['commit'\]"):
        read(path)
