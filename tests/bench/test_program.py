"""The benchmark's command line, on a CPU at small sizes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up import CEILINGS, ROW, results, write

from bench import program
from bench.cases.shapes import QUICK
from bench.harness import compare, machine
from bench.harness.case import COMPILED, EAGER
from bench.harness.command import INTERRUPTED, LOST, USER_ERROR
from bench.harness.machine import read_machine
from bench.harness.results import KILLED, OURS, Row, read
from bench.harness.run import DeviceLost
from bench.harness.selection import Selection
from bench.options import parser, select

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    text = capsys.readouterr().out
    for word in ("--op", "--mode", "--dtype", "--shapes", "--baseline", "--json", "--compare", "--quick"):
        assert word in text
    for word in ("nyud", "cityscapes", "torchvision fp16", "deformops", "SDPA flash", "task_attention"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "convolution"], "--op convolution: unknown"),
        (["--shapes", "moon"], "--shapes moon: unknown"),
        (["--op", "model", "--shapes", "launch"], "nothing to measure"),
        (["--quick", "--compare", "no-such-revision"], "neither a file nor a git revision"),
        (["--shapes", ""], "--shapes : unknown"),
        (["--baseline", EAGER, "none"], "--baseline: expected none alone"),
        (["--op", "batch_norm", "DeGMix head", "--shapes", "launch"], "--op DeGMix head has none of these"),
        (["--baseline", "nobody"], "--baseline nobody: unknown"),
        (["--with", "nowhere.py"], "nowhere.py: expected a Python file"),
        (["--json", "/dev/null/results.jsonl"], "its folder cannot be made"),
        (["--json", "/"], "expected a file, got a folder"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(arguments) == USER_ERROR
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_what_is_named_twice_is_measured_once() -> None:
    twice = ["--mode", "fwdbwd", "fwd", "fwdbwd", "--dtype", "fp32", "fp32"]
    selection = select(parser().parse_args(twice), CPU)
    assert (selection.modes, selection.dtypes) == (("fwdbwd", "fwd"), ("fp32",))


def test_end_to_end(tmp_path: Path) -> None:
    file, earlier = tmp_path / "results.jsonl", write(results(ROW), tmp_path / "earlier.jsonl")
    command = [sys.executable, "-m", "bench", "--quick", "--op", "batch_norm", "--json", str(file)]
    command += ["--baseline", EAGER, "--compare", str(earlier)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "batch_norm" in shown
    assert "then / now" in shown
    found = read(file)
    assert found.machine.torch == torch.__version__
    assert found.machine.tf32 == {"matmul": False, "cudnn": True}
    assert {row.impl for row in found.rows} == {OURS, EAGER}
    assert {row.mode for row in found.rows} == {"fwd", "fwdbwd"}


def test_a_file_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A known commit without changes, whatever the state of this checkout."""
    file = tmp_path / "results.jsonl"
    here = replace(read_machine(CPU), commit="c" * 40, dirty=False)
    monkeypatch.setattr(program, "read_machine", lambda device: here)
    monkeypatch.setattr(program, "measure_ceilings", lambda *_: CEILINGS)
    options = ["--op", "batch_norm", "--shapes", QUICK, "--baseline", "none", "--resume", str(file)]
    file.touch()  # as of a process that was killed at once
    assert program.main([*options, "--mode", "fwd"]) == 0
    (first,) = read(file).rows
    assert program.main([*options, "--mode", "fwd", "bwd"]) == 0
    assert [row.mode for row in read(file).rows] == ["fwd", "bwd"]
    assert read(file).rows[0] == first
    assert program.main([*options, "--mode", "fwd"]) == 0  # with nothing left to do
    assert len(read(file).rows) == 2
    options[options.index("none")] = EAGER
    assert program.main([*options, "--mode", "fwd"]) == 0  # ours once more, beside what it is compared with
    more = [(row.impl, row.mode, row.part) for row in read(file).rows[2:]]
    assert more == [(OURS, "fwd", 2), (EAGER, "fwd", 2)]
    killed = replace(first, impl=COMPILED, status=KILLED)
    write(replace(read(file), rows=(replace(killed, part=2),)), file)
    options[options.index(EAGER)] = COMPILED
    assert program.main([*options, "--mode", "fwd"]) == 0  # which is not begun again
    assert read(file).rows[-1].status == KILLED
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.jsonl", "results.md", "results-speed-up.png", "results-roofline.png"}
    monkeypatch.setattr(program, "read_machine", lambda device: replace(here, commit="d" * 40))
    assert program.main(options) == USER_ERROR
    assert f"--resume {file}: commit was {'c' * 40}" in capsys.readouterr().err
    for other in (["--json", str(file)], ["--quick"]):
        assert program.main([*options, *other]) == USER_ERROR


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), INTERRUPTED, "Interrupted: 3 measurements are left"),
        (DeviceLost("illegal address"), LOST, "The GPU answers no more: 3 measurements are left"),
    ],
)
def test_a_run_that_ends_early_keeps_what_it_has(
    error: BaseException,
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One row of ours, which failed, and then the end."""

    def ending(selection: Selection, *others: object) -> Iterator[tuple[Row, ...]]:
        *rest, impl = min(selection.keys())
        yield (Row(*rest, impl, status="failed: made up"),)
        raise error

    monkeypatch.setattr(program, "run", ending)
    file = tmp_path / "results.jsonl"
    options = ["--quick", "--op", "batch_norm", "--baseline", EAGER, "--json", str(file)]
    assert program.main(options) == code
    assert words in capsys.readouterr().out
    assert len(read(file).rows) == 1


def test_an_interrupt_before_measuring_is_one_sentence() -> None:
    code = """
import os, runpy, signal, bench.program
bench.program.main = lambda: os.kill(os.getpid(), signal.SIGINT)
runpy.run_module("bench", run_name="__main__")
"""

    def in_the_background() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=in_the_background
    )
    assert run.returncode == INTERRUPTED
    assert run.stderr == "bench: interrupted while nothing was being measured\n"


def git(folder: Path, *command: str) -> str:
    line = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.example", *command]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def commit_all(folder: Path) -> None:
    git(folder, "init", "-q")  # which changes no repository that is there
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "a commit")


def test_the_commit_can_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    monkeypatch.delenv(machine.COMMIT_VARIABLE, raising=False)
    assert (read_machine(CPU).commit, read_machine(CPU).dirty) == ("unknown", None)
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "c" * 40)
    assert read_machine(CPU).commit == "c" * 40
    (tmp_path / "code.py").write_text("")
    commit_all(tmp_path)
    # A copy whose .git is older than its files.
    assert (read_machine(CPU).commit, read_machine(CPU).dirty) == ("c" * 40, None)
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "not a commit")
    assert read_machine(CPU).commit == "unknown"
    monkeypatch.delenv(machine.COMMIT_VARIABLE)
    (tmp_path / "notes.txt").write_text("")
    assert len(read_machine(CPU).commit) == 40
    assert read_machine(CPU).dirty is False
    (tmp_path / "new.py").write_text("")
    assert read_machine(CPU).dirty is True


def test_another_revision_is_measured_in_its_own_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository of one commit, with a benchmark that leaves a result file and says where it ran."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "__main__.py").write_text(
        "import pathlib, shutil, sys\n"
        "assert sys.argv[1:3] == ['--quick', '--json']\n"
        "shutil.copy(pathlib.Path.cwd() / 'kept.jsonl', sys.argv[sys.argv.index('--json') + 1])\n"
    )
    write(results(ROW), tmp_path / "kept.jsonl")
    commit_all(tmp_path)
    monkeypatch.setattr(compare, "REPOSITORY", tmp_path)
    assert compare.earlier_results("HEAD", ["--quick"]) == results(ROW)
    assert len(git(tmp_path, "worktree", "list").splitlines()) == 1
    (tmp_path / "kept.jsonl").write_text('{"rows": []}\n')
    commit_all(tmp_path)
    with pytest.raises(compare.CompareError, match="writes its results in another form"):
        compare.earlier_results("HEAD", ["--quick"])
    write(results(ROW), tmp_path / "fresh.jsonl").replace(tmp_path / "kept.jsonl")
    crash = (tmp_path / "bench" / "__main__.py").read_text() + "raise RuntimeError('made up')\n"
    (tmp_path / "bench" / "__main__.py").write_text(crash)
    commit_all(tmp_path)
    with pytest.raises(compare.CompareError, match="ended early, with exit code 1 after 1 rows"):
        compare.earlier_results("HEAD", ["--quick"])
    (tmp_path / "bench" / "__main__.py").unlink()
    commit_all(tmp_path)
    with pytest.raises(compare.CompareError, match="has no benchmark yet"):
        compare.earlier_results("HEAD", [])
