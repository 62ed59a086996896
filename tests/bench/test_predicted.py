"""Predictions: of calls that the benchmark has, and beside what was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up import MACHINE, PART

from bench.cases.registry import everything
from bench.harness.case import EVENTS, LOOP
from bench.harness.results import OURS, Results, Row
from bench.report import predicted

FILES = sorted(predicted.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_prediction_is_of_a_call_of_the_headline_and_each_of_ours_has_one(path):
    """Rows of ops that are predicted at all: others were added since."""
    wanted = everything().headline().keys()
    found = predicted.predictions(path.stem)
    keys = [each.key for each in found]
    assert len(keys) == len(set(keys))
    assert set(keys) <= wanted
    ops = {key[0] for key in keys}
    assert {key for key in wanted if key[0] in ops and key[-1] == OURS} <= set(keys)
    assert all(0 < each.low < each.high and each.because for each in found)


def test_table(monkeypatch, tmp_path):
    monkeypatch.setattr(predicted, "FOLDER", tmp_path)
    results = Results((PART,))
    assert predicted.table(results) == []
    rows = "\n".join(
        f'{{"op": "op {n}", "shape": "s", "dtype": "bf16", "mode": "fwd", "impl": "ours", "ms": [1.0, 2.0], '
        f'"because": "reason {n}"}}{"," if n < 4 else ""}'
        for n in range(5)
    )
    (tmp_path / f"{MACHINE.folder}.json").write_text(f'{{"rows": [{rows}]}}', "utf-8")
    row = Row("op 0", "s", "bf16", "fwd", OURS, timer=EVENTS, ms=1.5)
    measured = (
        replace(row, timer=LOOP, ms=9.0),
        row,
        replace(row, op="op 1", ms=4.0),
        replace(row, op="op 2", ms=0.5),
        Row("op 3", "s", "bf16", "fwd", OURS, status="failed: made up"),
    )
    lines = predicted.table(replace(results, rows=measured))[-5:]
    assert [line.split(" | ")[3:] for line in lines] == [
        ["1.5", "", "reason 0 |"],
        ["4", "2.00×", "reason 1 |"],
        ["0.5", "0.50×", "reason 2 |"],
        ["failed: made up", "", "reason 3 |"],
        ["not measured", "", "reason 4 |"],
    ]
