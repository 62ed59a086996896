"""Rows that decide on a GPU: all of them run and are right at tiny sizes, and none costs more than itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench.gpu import decide
from bench.gpu.decide import __main__ as command
from bench.gpu.decide import driver

CALM = """
import torch

def rows(meter):
    one = torch.ones(3)
    meter.row("sum", "present", lambda: one + one, expected=lambda: 2 * one, bytes=24)
    meter.row("sum", "wrong", lambda: one, expected=lambda: 2 * one)
    meter.row("sum", "other", lambda: 2 * one, expected=lambda: 2 * one)
"""
DYING = """
import os, time

def rows(meter):
    meter.row("before", "present", lambda: None)
    meter.row("row", "dies", lambda: os._exit(7))
    meter.row("row", "hangs", lambda: time.sleep(1000) if meter.mode == "time" else None)
    meter.row("after", "present", lambda: None)
"""
BROKEN = """
def rows(meter):
    meter.row("before", "present", lambda: None)
    raise ValueError("no row")
"""
ENDLESS = """
import itertools, time

def rows(meter):
    for number in itertools.count() if meter.mode == "time" else ():
        meter.row("row", str(number), lambda: time.sleep(0.05))
"""


@pytest.mark.parametrize("name", decide.SECTIONS)
def test_every_row_runs_and_is_right(name: str) -> None:
    rows = decide.dry([name])
    assert rows
    assert {row["section"] for row in rows} == {name}
    assert [row for row in rows if "failed" in row] == []
    assert any("error" in row for row in rows), "nothing was compared"
    keys = [(row["name"], row["variant"]) for row in rows]
    assert len(set(keys)) == len(keys)


def test_the_limits_are_the_budget() -> None:
    assert decide.COMPILE_SECONDS + sum(decide.SECTIONS.values()) == decide.BUDGET_SECONDS <= 160
    folder = Path(decide.__file__).parent
    assert all((folder / f"{name}.py").exists() for name in decide.SECTIONS)


def measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, tuple[str, float]]
) -> list[dict]:
    """The rows of sections that are given by their source and their seconds."""
    folder = tmp_path / "made_up_sections"
    folder.mkdir()
    for name, (source, _) in sections.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(decide, "PACKAGE", folder.name)
    monkeypatch.setattr(decide, "SECTIONS", {name: seconds for name, (_, seconds) in sections.items()})
    monkeypatch.setattr(driver, "ROW_SECONDS", 2)
    monkeypatch.setattr(driver, "SAMPLE_SECONDS", 0)
    seconds = decide.COMPILE_SECONDS + sum(seconds for _, seconds in sections.values())
    monkeypatch.setattr(decide, "BUDGET_SECONDS", seconds)
    out = tmp_path / "rows.jsonl"
    rows = driver.Driver(out, list(sections), seconds).run()
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    return rows


def failures(rows: list[dict]) -> dict[tuple[str, str], str]:
    """(name, variant) of every row → why it failed, or nothing."""
    return {(row["name"], row["variant"]): row.get("failed", "") for row in rows}


def test_a_row_that_dies_or_hangs_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measured(tmp_path, monkeypatch, {"dying": (DYING, 60), "calm": (CALM, 60)})
    found = failures(rows)
    assert found.pop(("row", "dies")) == "the process died here"
    assert found.pop(("row", "hangs")) == "took longer than 2 s"
    assert found.pop(("sum", "wrong")).startswith("ArithmeticError: relative L2 error 5.0e-01, tolerance")
    assert found == dict.fromkeys(
        [("before", "present"), ("after", "present"), ("sum", "present"), ("sum", "other")], ""
    )
    present, other = (row for row in rows if row["section"] == "calm" and "failed" not in row)
    assert present["ratio"] == 1
    assert present["unit"] == "GB/s"
    assert other["ratio"] == other["ms"] / present["ms"]
    printed = capsys.readouterr().out
    assert "== dying: 4 rows" in printed
    assert "failed: took longer than 2 s" in printed


def test_a_section_is_ended_and_what_fails_outside_of_rows_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decide, "COMPILE_SECONDS", 1)  # what is left of it would go to the first
    sections = {"endless": (ENDLESS, 8), "broken": (BROKEN, 60), "calm": (CALM, 60)}
    rows = measured(tmp_path, monkeypatch, sections)
    last = [row for row in rows if row["section"] == "endless"][-1]
    assert last["failed"] == "the section's time was up"
    assert failures([row for row in rows if row["section"] == "broken"]) == {
        ("before", "present"): "",
        ("the section", ""): "the process died outside of a row",
    }
    assert sum(row["section"] == "calm" for row in rows) == 3
    assert "ValueError: no row" in (tmp_path / "rows.jsonl.log").read_text()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.jsonl"
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")  # which the command sets
    assert command.main([str(out), "products", "--dry"]) == 0
    assert {json.loads(line)["section"] for line in out.read_text().splitlines()} == {"products"}
    assert "11 rows, 0 failed" in capsys.readouterr().out
    monkeypatch.setattr(
        decide, "dry", lambda names: [{"section": "s", "name": "n", "variant": "", "failed": "x"}]
    )
    assert command.main([str(out), "--dry"]) == 1
    with pytest.raises(SystemExit):
        command.main([str(out), "nothing"])
