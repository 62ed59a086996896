"""Result files: what is written is read back, anything else is refused, and what is cut off costs itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import MACHINE, PART, ROW, results, write
from rich.table import Table

from bench.harness.results import KILLED, OURS, UNKNOWN, ResultFile, Results, Row, continue_, read, unused
from bench.report.speedups import comparisons
from bench.report.tables import compared_with, comparison_table, failures, op_tables

MEASURED = results(ROW)
EAGER = replace(ROW, impl="eager", ms=9.0)
COLUMNS = """op shape dtype mode impl device ms ms_p20 ms_p80 runs peak_bytes bytes flops speed_of_light
rel_error status commit torch triton cuda driver python"""


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "gpu" / "2026-01-02T0304-abc.jsonl"
    machine = replace(MACHINE, tf32={"matmul": False, "cudnn": True}, interpreted=True)
    later = replace(PART, machine=machine, measured="later", quick=True)
    whole = Results((PART, later), MEASURED.rows).with_rows((ROW, EAGER))
    assert read(write(whole, path)) == whole


@pytest.mark.parametrize(
    ("machine", "devices"),
    [
        ({}, [MACHINE.gpu, MACHINE.gpu]),
        ({"gpu": None}, ["CPU (reference)", "CPU"]),
        ({"gpu": None, "interpreted": True}, ["CPU (interpreter)", "CPU"]),
    ],
)
def test_a_line_is_a_measurement_with_all_that_is_known_of_it(
    tmp_path: Path, machine: dict, devices: list[str]
) -> None:
    """What pandas.read_json(path, lines=True) makes a row of; what a CPU computed says so."""
    part = replace(PART, machine=replace(MACHINE, **machine))
    path = write(results(ROW, EAGER, part=part), tmp_path / "r.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["impl"], line["ms"], line["runs"]) for line in lines] == [(OURS, 2, 10), ("eager", 9, 10)]
    assert all(set(COLUMNS.split()) <= line.keys() for line in lines)
    assert [line["device"] for line in lines] == devices


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    row = replace(ROW, ms=None, rel_error=float("nan"), status="check failed: NaN")
    assert read(write(results(row), tmp_path / "r.jsonl")).rows[0].rel_error is None


def test_a_line_that_was_half_written_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(MEASURED, tmp_path / "r.jsonl")
    with path.open("a") as file:
        file.write('{"op": "op", "sha')
    assert read(path) == MEASURED
    assert "its last line has no end, and is left out (17 bytes)" in capsys.readouterr().err
    assert read(write(results(EAGER), path)).rows == (ROW, EAGER)
    assert capsys.readouterr().err == ""


def test_what_was_killed_is_a_failed_row(tmp_path: Path) -> None:
    path = write(MEASURED, tmp_path / "new" / "r.jsonl")
    assert read(path).repeatable == {ROW.key}
    file = ResultFile(path, PART)
    file.begin(EAGER)
    assert read(path).rows == (ROW, replace(EAGER, status=KILLED))
    file.add([EAGER])
    file.begin(replace(ROW, ms=None))
    assert not read(path).repeatable  # as the last time it was killed
    file.close()
    assert read(path).rows == (ROW, EAGER)


def test_without_a_row_there_is_no_file(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "r.jsonl", PART)
    file.begin(ROW)
    file.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ms": "fast"}, r'r.jsonl, line 1: ms: expected a number or null, got "fast"'),
        ({"op": None}, "line 1: op: expected text, got null"),
        ({"bytes": True}, "line 1: bytes: expected an integer or null, got true"),
        ({"colour": 1}, "line 1: colour: unknown key"),
        ({"commit": 1}, r"line 1: machine\.commit: expected text, got 1"),
        ({"part": 1}, "line 1: part: there is no part 1"),
        (b"{\n", "line 1: not JSON"),
        (b"\xff\xd8\n", r"r\.jsonl, line 1: not JSON: 'utf-8' codec"),  # a picture
        (b"[]\n", "line 1: expected an object, got list"),
        (b"", "has no line that was measured"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: dict | bytes, message: str) -> None:
    """Files of other bytes, or of a line with other values in it."""
    path = write(MEASURED, tmp_path / "r.jsonl")
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode() + b"\n"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_lines_of_earlier_revisions_say_less(tmp_path: Path) -> None:
    path = write(MEASURED, tmp_path / "r.jsonl")
    line = json.loads(path.read_text())
    for name in ("runs", "tf32", "interpreted", "quick", "device"):
        del line[name]
    path.write_text(json.dumps(line) + "\n")
    assert read(path) == results(replace(ROW, runs=None))
    del line["commit"]
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"line 1: machine\.commit: missing key"):
        read(path)


def cells(table: Table, title: str) -> list[str]:
    """A column."""
    (column,) = (column for column in table.columns if column.header == title)
    return list(column.cells)


def test_tables_show_ratios_and_reasons() -> None:
    slow = Row("op", "nyud", "bf16", "fwd", "eager", ROW.timer, ms=5.0)
    absent = Row("op", "nyud", "bf16", "fwd", "other", status="not available: needs a GPU")
    (table,) = op_tables([ROW, slow, absent])
    assert "2.50×" in cells(table, "over ours")
    wrong = replace(ROW, timer=None, ms=None, status="check failed: far off")
    (table,) = op_tables([replace(ROW, speed_of_light=0.25), replace(wrong, impl="wrong")])
    assert "WRONG" in cells(table, "ms")
    assert "25" in cells(table, "% of light")
    assert failures([ROW, slow, absent]) == ["op: other: not available: needs a GPU (1×)"]
    earlier = results(Row(*ROW.case, OURS, ROW.timer, ms=3.0))
    assert list(comparison_table(MEASURED, earlier, "then").columns[-1].cells) == ["1.50×"]


def test_comparisons_tell_noise_and_machines() -> None:
    """Ours took 1 to 3 ms."""
    for low, high, shown in ((3.0, 5.0, "no difference"), (0.5, 1.0, "no difference"), (3.5, 5.0, "2.00×")):
        then = replace(ROW, ms=4.0, ms_p20=low, ms_p80=high)
        table = comparison_table(MEASURED, replace(MEASURED, rows=(then,)), "then")
        assert list(table.columns[-1].cells) == [shown]
    there = replace(MACHINE, gpu="a GPU", triton="3.9", commit="d" * 40)
    line = compared_with(MEASURED, results(ROW, part=replace(PART, machine=there)), "HEAD~1")
    assert line.startswith("HEAD~1 was measured on a GPU, torch 2.11.0, Python 3.11.0, triton 3.9, CUDA 13.0")
    assert line.endswith(". Not only the code is another now: device, triton")
    assert "another" not in compared_with(MEASURED, MEASURED, "HEAD")


def test_a_run_of_one_commit_is_continued() -> None:
    """On another machine of the same kind; a ratio is one of times of the same call."""
    there = replace(PART, machine=replace(MACHINE, clocks="1980 MHz", driver="2"), measured="later")
    both = continue_(MEASURED, there)
    assert both.parts == (PART, there)
    assert both.rows == (ROW,)
    alone, both = both.with_rows((EAGER,)), both.with_rows((replace(ROW, ms=3.0), EAGER))
    assert [row.part for row in both.rows] == [0, 1, 1]
    (call,) = comparisons(both.rows)
    assert call.ours == ROW
    assert [call.speed_up(other) for other in call.others] == [3.0]
    (call,) = comparisons(alone.rows)
    assert [call.speed_up(other) for other in call.others] == [None]
    for rows, shown in ((both.rows, ["", "", "", "3.00×"]), (alone.rows, ["", "", ""])):
        (table,) = op_tables(rows)
        assert cells(table, "over ours") == shown


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({}, {"commit": "d" * 40}, "commit was 0123"),
        ({}, {"torch": "2.15"}, "torch was 2.11.0 and is 2.15 now"),
        ({}, {"triton": "3.9"}, "triton was 3.6"),
        ({}, {"gpu": "a GPU"}, "gpu was Made-up GPU"),
        ({}, {"interpreted": True}, "interpreted was False and is True now"),
        ({}, {"tf32": {"matmul": True, "cudnn": True}}, "tf32 was None"),
        ({"dirty": True}, {"dirty": True}, "a known commit without changes"),
        ({"commit": UNKNOWN}, {"commit": UNKNOWN}, "a known commit without changes"),
    ],
)
def test_other_runs_are_not_continued(then: dict, now: dict, message: str) -> None:
    before, after = (replace(PART, machine=replace(MACHINE, **changes)) for changes in (then, now))
    with pytest.raises(ValueError, match="what --quick measured"):
        continue_(results(ROW, part=replace(PART, quick=True)), PART)
    with pytest.raises(ValueError, match=message):
        continue_(results(ROW, part=before), after)


def test_no_file_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "2026-01-02T030405-abc.jsonl"
    for name in (path.name, "2026-01-02T030405-abc-2.jsonl", "2026-01-02T030405-abc-3.jsonl"):
        assert unused(path).name == name
        write(MEASURED, unused(path))
