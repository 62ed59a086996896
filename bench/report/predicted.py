"""What was predicted of the benchmark's calls before a GPU ran them, beside what a result file says.

``predictions/<gpu>.json``, named as the GPU's folder of results, has for each call a range of milliseconds
and the reason for it. It is written before a measurement and never after.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bench.harness.case import EVENTS
from bench.harness.results import Key, Results

FOLDER = Path(__file__).parents[1] / "predictions"


@dataclass(frozen=True)
class Prediction:
    """One row that is expected, in milliseconds."""

    key: Key
    low: float
    high: float
    because: str  # where they come from

    def off_by(self, ms: float) -> str:
        """How far outside of the range a time is, in words; nothing within."""
        if self.low <= ms <= self.high:
            return ""
        return f"{ms / (self.high if ms > self.high else self.low):.2f}×"


def predictions(gpu: str) -> list[Prediction]:
    """What was predicted of a GPU, by the name of its folder of results; nothing if no file is named so."""
    path = FOLDER / f"{gpu}.json"
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    names = ("op", "shape", "dtype", "mode", "impl")
    return [Prediction(tuple(row[name] for name in names), *row["ms"], row["because"]) for row in rows]


def table(results: Results) -> list[str]:
    """Every prediction in Markdown beside the device's time, or beside the reason why there is none."""
    found = predictions(results.machine.folder)
    if not found:
        return []
    lines = [
        "",
        "Predicted before the first measurement, and measured; *off by* is the time over the nearer end of "
        "the range:",
        "",
        "| call | implementation | predicted, ms | measured, ms | off by | predicted because |",
        "|---|---|---:|---:|---:|---|",
    ]
    for each in found:
        op, shape, dtype, mode, implementation = each.key
        rows = [row for row in results.rows if row.key == each.key]
        ms = next((row.ms for row in rows if row.timer == EVENTS and row.ms is not None), None)
        status = rows[0].status if rows else "not measured"
        measured, off = (status, "") if ms is None else (f"{ms:.3g}", each.off_by(ms))
        lines.append(
            f"| `{op}`, {shape}, {dtype}, {mode} | {implementation} | {each.low:g}–{each.high:g} "
            f"| {measured} | {off} | {each.because} |"
        )
    return lines
