"""README's tables and the pictures, from made-up result files: no number here was ever measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import report
from bench.results import OURS, Ceilings, Machine, Results, Row, write

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
EVENTS = "cuda events"


def made_up(op: str, shape: str, mode: str, impl: str, ms: float | None, size: int = 10**8, **more) -> Row:
    """A row of an op in bf16 that took ``ms`` and moved ``size`` bytes."""
    row = Row(op, shape, "bf16", mode, impl, timer=EVENTS, ms=ms, ms_p20=ms, ms_p80=ms, bytes=size)
    return replace(row, flops=20 * size, speed_of_light=0.5, peak_bytes=size, **more)


ROWS = (
    made_up("channel_mix", "nyud", "fwd", OURS, 0.5),
    made_up("channel_mix", "nyud", "fwd", "eager reference", 1.5),
    made_up("channel_mix", "nyud", "fwd", "torch.compile", 0.25),
    made_up("channel_mix", "nyud", "fwdbwd", OURS, 2.0),
    made_up("channel_mix", "nyud", "fwdbwd", "eager reference", 4.0),
    Row("channel_mix", "nyud", "bf16", "fwdbwd", "torch.compile", status="failed: RuntimeError: made up"),
    made_up("channel_mix", "launch", "fwd", OURS, 0.01, 10**4),
    made_up("channel_mix", "launch", "fwd", "eager reference", 0.07, 10**4),
    Row("batch_norm", "nyud", "bf16", "fwd", OURS, status="check failed: made up"),
    made_up("batch_norm", "nyud", "fwd", "eager reference", 1.0),
    replace(made_up("task_attention", "nyud", "fwd", OURS, 0.1), flops=0),
    made_up("DeGMix head", "nyud b8", "training step", OURS, 40.0, images=8),
    made_up("DeGMix head", "nyud b8", "training step", "eager formula", 100.0, 3 * 10**8, images=8),
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a README and no results."""
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "bench" / "results")
    (tmp_path / "README.md").write_text(f"above\n{report.BEGIN}\n{report.END}\nbelow\n", "utf-8")
    return tmp_path


def put(checkout: Path, results: Results, name: str = "2030-01-02-0123456789.json") -> Path:
    path = checkout / "bench" / "results" / "made-up" / name
    write(results, path)
    return path


def test_without_results_one_sentence_says_so(checkout, capsys):
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert "no complete result file of a GPU under bench/results" in capsys.readouterr().out
    text = (checkout / "README.md").read_text("utf-8")
    assert text == f"above\n{report.BEGIN}\n{report.NO_RESULT}\n{report.END}\nbelow\n"
    assert report.main(["--check"]) == 0
    assert not (checkout / "docs").exists()


def test_times_of_a_cpu_are_no_result(checkout):
    put(checkout, Results(replace(MACHINE, gpu=None), CEILINGS, ROWS, complete=True))
    assert report.main([]) == 0
    assert report.NO_RESULT in (checkout / "README.md").read_text("utf-8")


def test_an_incomplete_file_is_no_result(checkout):
    put(checkout, Results(MACHINE, CEILINGS, ROWS, complete=False), "2031-01-01-0123456789.json")
    assert report.main([]) == 0
    assert report.NO_RESULT in (checkout / "README.md").read_text("utf-8")


def test_the_newest_result_becomes_tables_and_pictures(checkout):
    put(checkout, Results(MACHINE, CEILINGS, (), complete=True), "2029-12-31-fedcba9876.json")
    put(checkout, Results(MACHINE, CEILINGS, ROWS, complete=True))
    assert report.main([]) == 0
    text = (checkout / "README.md").read_text("utf-8")
    assert text.startswith("above\n")
    assert text.endswith(f"\n{report.END}\nbelow\n")
    assert "on Made-up GPU, torch 2.11.0, Triton 3.6.0, CUDA 13.0, driver 1.2, commit 0123456789: " in text
    assert "(bench/results/made-up/2030-01-02-0123456789.json). Ceilings in the same run: copy 4 TB/s" in text
    lines = [
        "| `channel_mix` | nyud, bf16, fwd | 0.5 | 50% | eager reference 3.00×, torch.compile 0.50× |",
        "| `channel_mix` | nyud, bf16, fwdbwd | 2 | 50% | eager reference 2.00×, torch.compile – |",
        "| `batch_norm` | nyud, bf16, fwd | check failed | – | eager reference – |",
        "| `task_attention` | nyud, bf16, fwd | 0.1 | 50% |  |",
        "| DeGMix head | nyud b8, bf16, training step | 200 | 95 | eager formula 2.50× | eager formula 33% |",
    ]
    assert [line for line in text.splitlines() if line.startswith(("| `", "| DeGMix"))] == lines
    assert "1 of 6 calls of ours have no time; the file says why." in text
    for name in ("speed-up", "roofline", "model-memory"):
        assert f"(docs/benchmark/{name}.png)" in text
        assert (checkout / "docs" / "benchmark" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_check_sees_a_typed_number(checkout, capsys):
    put(checkout, Results(MACHINE, CEILINGS, ROWS, complete=True))
    report.main([])
    assert report.main(["--check"]) == 0
    readme = checkout / "README.md"
    readme.write_text(readme.read_text("utf-8").replace("3.00×", "9.00×"), "utf-8")
    assert report.main(["--check"]) == 1
    assert "python -m bench.report rewrites it" in capsys.readouterr().err
    assert "9.00×" in readme.read_text("utf-8")  # checking changes nothing


def test_pictures_without_rows_are_removed(checkout):
    put(checkout, Results(MACHINE, CEILINGS, ROWS, complete=True))
    report.main([])
    put(checkout, Results(MACHINE, Ceilings(None, {}), ROWS[:2], complete=True), "2031-01-01-0123456789.json")
    report.main([])
    assert [path.name for path in (checkout / "docs" / "benchmark").iterdir()] == ["speed-up.png"]
    assert "roofline" not in (checkout / "README.md").read_text("utf-8")


def test_a_file_of_a_users_own_is_reported_beside_it(checkout, tmp_path):
    path = tmp_path / "own" / "mine.json"
    write(Results(replace(MACHINE, gpu=None, dirty=True), CEILINGS, ROWS, complete=True), path)
    before = report.README.read_text("utf-8")
    assert report.main([str(path)]) == 0
    text = path.with_suffix(".md").read_text("utf-8")
    assert "commit 0123456789 with changes: [mine.json](mine.json). On a CPU the ops run" in text
    assert (path.parent / "roofline.png").exists()
    assert report.README.read_text("utf-8") == before


def test_a_wrong_file_or_readme_is_said(checkout, capsys):
    path = checkout / "bench" / "results" / "broken.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert report.main([]) == report.USER_ERROR
    assert "broken.json: missing keys" in capsys.readouterr().err
    path.unlink()
    (checkout / "README.md").write_text("no markers")
    assert report.main([]) == report.USER_ERROR
    assert "README.md: expected one <!-- benchmark" in capsys.readouterr().err


def test_readme_is_up_to_date():
    assert report.main(["--check"]) == 0
