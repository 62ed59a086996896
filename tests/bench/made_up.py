"""Results for tests: no number here was ever measured."""

from __future__ import annotations

import itertools
from pathlib import Path

from bench.harness.results import OURS, Ceilings, Machine, Part, ResultFile, Results, Row

MACHINE = Machine(
    gpu="Made-up GPU",
    cpu="made-up CPU",
    driver="1.2",
    cuda="13.0",
    torch="2.11.0",
    triton="3.6.0",
    python="3.11.0",
    clocks=None,
    commit="0123456789abcdef0123456789abcdef01234567",
    dirty=False,
)
CEILINGS = Ceilings(copy=4e12, matrix={"bf16": 8e14, "fp32": 5e13})
WHEN = "2030-01-02T03:04:05"
PART = Part(MACHINE, CEILINGS, WHEN)
ROW = Row("op", "nyud", "bf16", "fwd", OURS, "cuda events", ms=2.0, ms_p20=1.0, ms_p80=3.0, runs=10)


def results(*rows: Row, part: Part = PART) -> Results:
    """The rows of one call."""
    return Results((part,), rows)


def write(measured: Results, path: Path) -> Path:
    """Write a file as the benchmark does, call by call."""
    for number, rows in itertools.groupby(measured.rows, lambda row: row.part):
        file = ResultFile(path, measured.parts[number])
        file.add(rows)
        file.close()
    return path
