"""Prototypes that decide on a GPU: all of them run and are right at tiny sizes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from bench.cases.own import Own
from bench.cases.registry import cases
from bench.gpu import decide
from bench.harness import run as loop
from bench.harness.measure import Timing
from degmix_kernels import use_backend
from degmix_kernels.testing import tolerance

TINY = """
from bench.cases.own import Contender, Convolution, Map
from bench.gpu import decide
from bench.gpu.decide.columns import by_columns

CONTENDERS = [*decide.CONTENDERS, Contender("parts of an image", "deform_conv2d (general)", by_columns(5e-3))]
SHAPES = [
    Map("map", 2, 4, 5, 7),
    Convolution(1, 16, 9, 11, 1.0, "four tiles"),
    Convolution(2, 32, 2, 3, 1.0, "groups", offset_groups=8),
]
"""


def test_every_prototype_runs_and_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is measured in one pass, and says of the other that it has none."""
    file, out = tmp_path / "tiny.py", tmp_path / "rows.jsonl"
    file.write_text(TINY)
    names = [*(each.name for each in decide.CONTENDERS), "parts of an image"]
    monkeypatch.setattr(loop, "measure", lambda *_: Timing(1.0, 1.0, 1.0, 10))
    monkeypatch.setattr(sys, "argv", ["", str(out), "--with", str(file), "--baseline", *names])
    with use_backend("reference"), pytest.raises(SystemExit, match="0"):  # of ours, which other tests check
        runpy.run_module("bench.gpu.decide", run_name="__main__")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for name in names:
        own = [row for row in rows if row["impl"] == name]
        (good,) = (row for row in own if row["status"] == "ok")
        assert good["rel_error"] <= tolerance(torch.bfloat16, 1), name
        (other,) = (row["status"] for row in own if row is not good)
        assert other.startswith("not available: it")


def test_the_real_shapes_are_new() -> None:
    every = cases(Own(tuple(decide.CONTENDERS), tuple(decide.SHAPES)))
    assert {shape.name for shape in decide.SHAPES} <= {case.shape for case in every}
