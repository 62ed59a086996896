"""Contenders and shapes of somebody's own: README's example, and what can be wrong with such a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from bench import program
from bench.cases.own import Convolution, Own
from bench.cases.registry import cases
from bench.harness.command import USER_ERROR
from bench.options import parser, select

README = Path(__file__).parents[2] / "bench" / "README.md"
CPU = torch.device("cpu")
BEGINNING = "from bench.cases.own import Contender, Map\n"


def test_the_example_of_the_readme(tmp_path: Path) -> None:
    marked = r"test_own.py runs this file -->\n```python\n(.*?)```"
    (example,) = re.findall(marked, README.read_text("utf-8"), re.S)
    file, out = tmp_path / "mine.py", tmp_path / "results.jsonl"
    file.write_text(example)
    assert program.main(["--with", str(file), "--json", str(out), "--mode", "fwdbwd"]) == 0
    lines = {line["impl"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert {"ours", "eager reference", "with rsqrt"} <= lines.keys()
    for name, device in (("ours", "CPU (reference)"), ("with rsqrt", "CPU")):
        line = lines[name]
        expected = {"op": "batch_norm", "shape": "mine", "status": "ok", "device": device}
        assert line.items() >= expected.items()
        assert line["ms_p20"] <= line["ms"] <= line["ms_p80"]
        assert line["runs"] >= 10


def test_other_options_choose_among_more(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"{BEGINNING}SHAPES = [Map('mine', 1, 4, 5, 6)]\n")

    def selected(*options: str) -> set[tuple[str, str]]:
        chosen = select(parser().parse_args(["--with", str(file), *options]), CPU)
        return {(case.op, case.shape) for case in chosen.cases}

    every = selected()
    assert {shape for _, shape in every} == {"mine"}
    assert {"deform_mix", "gated_mlp", "spatial_gating_unit"} <= {op for op, _ in every}
    both = selected("--op", "deform_mix", "--shapes", "quick", "mine")
    assert both == {("deform_mix", "quick"), ("deform_mix", "mine")}


@pytest.mark.parametrize(
    ("groups", "op"),
    [
        (1, "deform_conv2d (general)"),
        (4, "deform_conv2d (small groups)"),
        (16, "deform_conv2d (per channel)"),
    ],
)
def test_a_convolution_is_measured_on_its_path(groups: int, op: str) -> None:
    own = Own(shapes=(Convolution(1, 16, 8, 9, 1.0, "mine", offset_groups=groups),))
    assert [case.op for case in cases(own) if case.shape == "mine"] == [op]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "expected a list CONTENDERS, a list SHAPES, or both"),
        ("x = ", "mine.py: does not run: SyntaxError"),
        ("SHAPES = 3", "SHAPES: expected a list, got int"),
        ("SHAPES = ['nyud']", "SHAPES: expected each to be a Map or Convolution, got 'nyud'"),
        ("CONTENDERS = [Contender('a', 'conv', print)]", "contender a: no op is called conv"),
        ("CONTENDERS = [Contender('ours', 'batch_norm', print)]", "contender ours: the name is taken"),
        ("SHAPES = [Map('nyud', 1, 2, 3, 4)]", "shape nyud: the name is taken"),
    ],
)
def test_mistakes_are_one_sentence(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(BEGINNING + text)
    assert program.main(["--with", str(file)]) == USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench: ")
    assert message in line
