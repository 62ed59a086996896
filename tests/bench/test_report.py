"""README's tables and the pictures, from made-up result files: no number here was ever measured."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import MACHINE, PART, WHEN, results, write

import bench.report
from bench.cases.registry import CASES
from bench.harness.case import EVENTS, LOOP
from bench.harness.results import OURS, UNKNOWN, Ceilings, Results, Row
from bench.report import goals
from bench.report import pages as report
from bench.report.speedups import comparisons, shown
from bench.training import Curve
from bench.training import write as write_curves


def timed(op: str, shape: str, mode: str, impl: str, ms: float | None, size: int = 10**8, **more) -> Row:
    """A row of an op in bf16 that took ``ms`` and moved ``size`` bytes."""
    row = Row(op, shape, "bf16", mode, impl, timer=EVENTS, ms=ms, ms_p20=ms, ms_p80=ms, bytes=size)
    return replace(row, flops=20 * size, speed_of_light=0.5, peak_bytes=size, **more)


ROWS = (
    timed("channel_mix", "nyud", "fwd", OURS, 0.5),
    timed("channel_mix", "nyud", "fwd", "eager reference", 1.5),
    timed("channel_mix", "nyud", "fwd", "torch.compile", 0.25),
    timed("channel_mix", "nyud", "fwdbwd", OURS, 2.0),
    timed("channel_mix", "nyud", "fwdbwd", "eager reference", 4.0),
    Row("channel_mix", "nyud", "bf16", "fwdbwd", "torch.compile", status="failed: RuntimeError: made up"),
    timed("channel_mix", "launch", "fwd", OURS, 0.01, 10**4),
    timed("channel_mix", "launch", "fwd", "eager reference", 0.07, 10**4),
    Row("batch_norm", "nyud", "bf16", "fwd", OURS, status="check failed: made up"),
    timed("batch_norm", "nyud", "fwd", "eager reference", 1.0),
    replace(timed("task_attention", "nyud", "fwd", OURS, 0.1), flops=0),
    timed("DeGMix head", "nyud b8", "training step", OURS, 40.0, images=8),
    timed("DeGMix head", "nyud b8", "training step", "eager formula", 100.0, 3 * 10**8, images=8),
    replace(timed("DeGMix head", "nyud b1", "inference", OURS, 5.0, images=1), timer=LOOP),
)


MEASURED = results(*ROWS)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both READMEs and no results."""
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "PUBLISHED", tmp_path / "bench" / "results")
    monkeypatch.setattr(report, "BENCH_README", tmp_path / "bench" / "README.md")
    monkeypatch.setattr(report, "PAGES", (tmp_path / "degmix_kernels" / "channel_mix" / "README.md",))
    for path in (report.README, report.BENCH_README, *report.PAGES):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"above\n{report.BEGIN}\n{report.END}\nbelow\n", "utf-8")
    return tmp_path


def put(checkout: Path, measured: Results, when: str = WHEN) -> Path:
    """A file under a name that has no part in which file is the newest."""
    first = replace(measured.parts[0], measured=when)
    path = checkout / "bench" / "results" / "made-up" / f"{9999 - int(when[:4])}.jsonl"
    return write(replace(measured, parts=(first, *measured.parts[1:])), path)


def reported(
    checkout: Path, measured: Results | None = None, when: str = WHEN, page: str = "README.md"
) -> str:
    """A page, after another file was put there."""
    if measured is not None:
        put(checkout, measured, when)
    assert report.main([]) == 0
    return (checkout / page).read_text("utf-8")


def test_without_results_one_sentence_says_so(checkout, capsys):
    """Times of a CPU are no result."""
    assert report.main(["--check"]) == 1
    text = reported(checkout, results(*ROWS, part=replace(PART, machine=replace(MACHINE, gpu=None))))
    assert "no result file of a GPU under bench/results" in capsys.readouterr().out
    assert text == f"above\n{report.BEGIN}\n{report.NO_RESULT}\n{report.END}\nbelow\n"
    (page,) = report.PAGES
    assert "No GPU has timed these ops yet." in page.read_text("utf-8")
    assert report.main(["--check"]) == 0
    assert not (checkout / "docs").exists()


def test_an_incomplete_file_says_so_and_a_complete_one_is_preferred(checkout, monkeypatch):
    text = reported(checkout, MEASURED, "2031-01-01T00:00:00")
    assert "The run was stopped before its end: a baseline that is missing here was not measured." in text
    monkeypatch.setattr(report, "is_complete", lambda measured: len(measured.rows) == 1)
    text = reported(checkout, results(ROWS[0]), "2030-12-31T00:00:00")
    assert "stopped before its end" not in text
    assert "batch_norm" not in text


def test_the_newest_result_becomes_tables_and_pictures(checkout):
    """Without ops that are gone."""
    put(checkout, results(ROWS[0]), "2029-12-31T00:00:00")
    text = reported(checkout, results(*ROWS, replace(ROWS[0], op="an op of before")))
    assert text.startswith("above\n")
    assert text.endswith(f"\n{report.END}\nbelow\n")
    assert "on Made-up GPU, torch 2.11.0, Triton 3.6.0, CUDA 13.0, driver 1.2, commit 0123456789: " in text
    assert "(bench/results/made-up/7969.jsonl). Ceilings, measured with it: copy 4 TB/s" in text
    lines = [
        "| `channel_mix` | nyud, bf16, fwd | 0.5 | 50% | eager reference 3.00×, torch.compile 0.50× |",
        "| `channel_mix` | nyud, bf16, fwdbwd | 2 | 50% | eager reference 2.00×, torch.compile – |",
        "| `batch_norm` | nyud, bf16, fwd | check failed | – | eager reference – |",
        "| `task_attention` | nyud, bf16, fwd | 0.1 | 50% |  |",
        "| DeGMix head | nyud b8, bf16, training step | 200 | 95 | eager formula 2.50× | eager formula 33% |",
        "| DeGMix head | nyud b1, bf16, inference, launches included | 200 | 95 |  |  |",
    ]
    assert [line for line in text.splitlines() if line.startswith(("| `", "| DeGMix"))] == lines
    assert "1 of 7 calls of ours failed; the file says why." in text
    for name in ("speed-up", "roofline", "model-memory"):
        assert f"(docs/benchmark/{name}.png)" in text
        assert (checkout / "docs" / "benchmark" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_has_its_own_ops_alone(checkout):
    lines = reported(checkout, MEASURED, page="degmix_kernels/channel_mix/README.md").splitlines()
    source = "[7969.jsonl](../../bench/results/made-up/7969.jsonl)"
    assert f"`python -m bench`, Made-up GPU, commit 0123456789: {source}." in lines
    assert [line.partition(", bf16")[0] for line in lines if line.startswith("| `")] == [
        "| `channel_mix` | nyud",
        "| `channel_mix` | nyud",
    ]
    assert report.main(["--check"]) == 0


def test_goals_stand_beside_what_was_measured(checkout):
    """Ours is 3 times as fast as one baseline, half as fast as another, and at half of the speed of light."""
    text = reported(checkout, page="bench/README.md")
    assert "| `channel_mix` | at least 1.2× as fast as torch.compile | not measured |  |" in text
    shown = replace(ROWS[2], op="deform_mix", impl="torchvision fp16")
    small = replace(ROWS[0], op="deform_mix", shape="launch", timer=LOOP, ms=9.0)
    measured = results(*ROWS, replace(ROWS[0], op="deform_mix"), shown, small)
    text = reported(checkout, measured, page="bench/README.md")
    compiled = "torch.compile | 0 of 1 | 0.50×: nyud, fwd, torch.compile |"
    light = "at least 45% of the speed of light | 2 of 2 | 50%: nyud, fwd |"
    memory = "1 of 1 | 33%: nyud b8, training step, eager formula |"
    for line in (
        f"| `channel_mix` | at least 1.2× as fast as {compiled}",
        f"| `channel_mix` | {light}",
        f"| `DeGMix head` | at most 35% of the peak memory of eager formula, training step | {memory}",
        "| `deform_mix` | at least 5× as fast as torchvision | 0 of 1 | 0.50×: nyud, fwd, torchvision fp16 |",
    ):
        assert line in text.splitlines()


def test_training_and_profile_stand_beside_the_goals(checkout, capsys):
    path = put(checkout, MEASURED)
    curves = {
        OURS: Curve("ok", 3, 3, 50.0, 0.1, (3.0, 2.0, 1.0)),
        "eager formula": Curve("out of time", 3, 2, 20.0, 0.0, (3.0, 2.0)),
    }
    (path.parent / "training").mkdir()
    write_curves(path.parent / "training", MACHINE, "made up", curves)
    (path.parent / "profile.md").write_text(
        "DeGMix head\n\n| kernel | share |\n|---|---:|\n| `made up` | 9% |\n"
    )
    lines = reported(checkout, page="bench/README.md").splitlines()
    for line in (
        "`python -m bench.training`, made up, torch 2.11.0, Triton 3.6.0, CUDA 13.0, driver 1.2, "
        "commit 0123456789:",
        "- ours: 50 images/s, 10% of the time waiting for data",
        "- eager formula: 20 images/s, 2 of 3 steps: out of time",
        "![loss curves](results/made-up/training/training.png)",
        "`python -m bench.profile_step`: DeGMix head",
        "| `made up` | 9% |",
    ):
        assert line in lines
    (path.parent / "training" / "training.json").write_text('{"what": 1}')
    assert report.main([]) == report.USER_ERROR
    assert "training.json: not what bench.training writes" in capsys.readouterr().err


def test_check_sees_a_typed_number(checkout, capsys):
    reported(checkout, MEASURED)
    assert report.main(["--check"]) == 0
    for name, typed in (("README.md", "3.00×"), ("bench/README.md", "50%")):
        readme, text = checkout / name, (checkout / name).read_text("utf-8")
        readme.write_text(text.replace(typed, "99"), "utf-8")
        assert report.main(["--check"]) == 1
        assert capsys.readouterr().err.startswith(f"{name} is not what the newest result gives: ")
        assert "99" in readme.read_text("utf-8")  # checking changes nothing
        readme.write_text(text, "utf-8")


def test_pictures_without_rows_are_removed(checkout):
    reported(checkout, MEASURED)
    fewer = results(*ROWS[:2], part=replace(PART, ceilings=Ceilings(None, {})))
    text = reported(checkout, fewer, "2031-01-01T00:00:00")
    assert [path.name for path in (checkout / "docs" / "benchmark").iterdir()] == ["speed-up.png"]
    assert "roofline" not in text


def test_a_file_of_a_users_own_is_reported_beside_it(checkout, tmp_path):
    path = tmp_path / "own" / "mine.jsonl"
    write(results(*ROWS, part=replace(PART, machine=replace(MACHINE, gpu=None, dirty=True))), path)
    before = report.README.read_text("utf-8")
    assert report.main([str(path)]) == 0
    text = path.with_suffix(".md").read_text("utf-8")
    assert "commit 0123456789 with changes: [mine.jsonl](mine.jsonl). On a CPU our ops run" in text
    assert (path.parent / "mine-roofline.png").exists()
    assert "(mine-roofline.png)" in text
    assert report.README.read_text("utf-8") == before


def test_tables_need_no_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bench.report.plots", raising=False)
    monkeypatch.delattr(bench.report, "plots", raising=False)
    path = tmp_path / "mine.jsonl"
    write(MEASURED, path)
    assert report.main([str(path)]) == 0
    assert "No pictures: import of matplotlib halted" in capsys.readouterr().out
    assert "| `channel_mix` | nyud, bf16, fwd | 0.5 |" in path.with_suffix(".md").read_text("utf-8")
    assert not list(tmp_path.glob("*.png"))


def test_publishing_takes_the_name_from_the_file(checkout, tmp_path, capsys, monkeypatch):
    """Only of whole runs of a known commit on a GPU."""
    path, name = tmp_path / "results.jsonl", "2030-01-02T030405-0123456789"
    assert report.main(["--publish", str(write(MEASURED, path))]) == report.USER_ERROR
    assert "results.jsonl: expected a complete run on a GPU" in capsys.readouterr().err
    monkeypatch.setattr(report, "is_complete", lambda measured: True)
    for changes in ({"gpu": None}, {"dirty": True}, {"commit": UNKNOWN}):
        path.unlink()
        write(results(*ROWS, part=replace(PART, machine=replace(MACHINE, **changes))), path)
        assert report.main(["--publish", str(path)]) == report.USER_ERROR
        assert "expected" in capsys.readouterr().err
    for stem in (name, f"{name}-2"):
        path.unlink(missing_ok=True)
        assert report.main(["--publish", str(write(MEASURED, path))]) == 0
        assert (checkout / "bench" / "results" / "madeup-gpu" / f"{stem}.jsonl").is_file()
        assert not path.exists()
    assert f"(bench/results/madeup-gpu/{name}" in (checkout / "README.md").read_text("utf-8")
    with pytest.raises(SystemExit, match="2"):
        report.main(["--publish", str(path), "--check"])


def test_ratios_are_those_of_one_call(checkout):
    """A compiled baseline that was measured a call later, on a machine that had become slower."""
    later = replace(PART, machine=replace(MACHINE, driver="1.3"), ceilings=Ceilings(3e12, {}))
    again = (replace(ROWS[0], ms=1.0), replace(ROWS[2], ms=4.0))
    text = reported(checkout, Results((PART, later), ROWS[:2]).with_rows(again))
    assert "| 0.5 | 50% | eager reference 3.00×, torch.compile 4.00× |" in text
    assert "driver 1.2 and 1.3, commit" in text
    assert "In 2 calls, each with ceilings of its own" in text


def test_a_wrong_file_or_readme_is_said(checkout, capsys):
    path = checkout / "bench" / "results" / "made-up" / "2030-broken.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    assert report.main([]) == report.USER_ERROR
    assert "broken.jsonl, line 1: op: missing key" in capsys.readouterr().err
    path.unlink()
    (checkout / "README.md").write_text("no markers", "utf-8")
    assert report.main([]) == report.USER_ERROR
    assert "README.md: expected one <!-- benchmark" in capsys.readouterr().err


def test_readme_is_up_to_date():
    assert report.main(["--check"]) == 0


def test_an_op_is_shown_at_nyuds_maps_in_bf16_by_one_timer():
    """Not what happens to come first in the file, and graphs not beside loops."""
    ours = timed("op", "nyud", "fwd", OURS, 1.0)
    rows = [
        replace(ours, shape="pascal", ms=7.0),
        replace(ours, dtype="fp32", ms=8.0),
        ours,
        replace(ours, impl="eager", ms=3.0),
        replace(ours, impl="eager", ms=9.0, timer=LOOP),
    ]
    (call,) = shown(results(*rows))
    assert call.ours == ours
    assert [call.speed_up(other) for other in call.others] == [3.0]


def test_a_failure_hides_no_times():
    """Forward failed, and so has no timer; with backward it was timed in two ways."""
    ours = timed("op", "launch", "fwdbwd", OURS, 1.0)
    failed = Row("op", "launch", "bf16", "fwd", OURS, status="failed: made up")
    calls = shown(results(failed, ours, replace(ours, timer=LOOP)))
    assert [call.ours for call in calls] == [failed, ours]


def test_goals_are_about_bf16():
    goal = goals.Goal("op", goals.LIGHT, 0.4)
    rows = [timed("op", "nyud", "fwd", OURS, 1.0), timed("op", "pascal", "fwd", OURS, 1.0)]
    calls = comparisons([*rows, replace(rows[0], dtype="fp32", speed_of_light=0.1)])
    assert [value for value, _ in goal.values(calls)] == [0.5, 0.5]


def test_goals_are_about_what_is_measured():
    """A goal of an op or baseline that has another name would never be measured, and never be missed."""
    for goal in goals.GOALS:
        of_op = [case for case in CASES if case.op == goal.op]
        assert of_op, goal.op
        names = {name for case in of_op for name in case.implementations if name != OURS}
        assert not goal.against or any(name.startswith(goal.against) for name in names), goal
