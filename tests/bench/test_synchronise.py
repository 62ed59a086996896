"""The plugin that waits for the GPU after each test, without a GPU: waiting fails from some test on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.visits import MOST_ARE_WRONG

REPOSITORY = Path(__file__).parents[2]
ERROR = "CUDA error: an illegal memory access was encountered"

TORCH = f"""  # stands for PyTorch, which takes seconds to load
class cuda:
    lost = False
    is_available = is_initialized = staticmethod(lambda: True)

    def synchronize():
        if cuda.lost:
            raise RuntimeError("{ERROR}\\nCUDA kernel errors might be reported later")
"""
TESTS = """
import pytest
import torch

@pytest.fixture
def loses_the_gpu_at_last():
    yield
    torch.cuda.lost = True

def test_before():
    pass

def test_in_call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.cuda.lost = True

def test_between():
    pass

def test_in_teardown(loses_the_gpu_at_last):
    pass

def test_after():
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "torch.py").write_text(TORCH, encoding="utf-8")
    (tmp_path / "test_loses.py").write_text(TESTS, encoding="utf-8")
    return tmp_path


def run_pytest(folder: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu.synchronise", "-p", "no:cacheprovider", "-rA"]
    # The tests that run this one may be a worker's, too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}", **settings}
    return subprocess.run([*command, *options], cwd=folder, env=environment, capture_output=True, text=True)


def outcomes(output: str) -> dict[str, set[str]]:
    """Outcome → names of tests, of pytest's summary."""
    found: dict[str, set[str]] = {}
    for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) \S+::(\w+)", output, re.MULTILINE):
        found.setdefault(outcome, set()).add(name)
    return found


def test_worker_ends_and_others_go_on(folder: Path) -> None:
    process = run_pytest(folder, "-n", "1", DEGMIX_CRASHES="lost.txt")
    assert process.returncode == 1, process.stdout + process.stderr
    found = outcomes(process.stdout)
    assert found["FAILED"] == {"test_in_call", "test_in_teardown"}
    assert found["PASSED"] >= {"test_before", "test_between", "test_after"}
    assert process.stdout.count("crashed while running") >= 2
    names = ("test_in_call", "test_in_teardown")
    lines = [f"test_loses.py::{name}: {ERROR}" for name in names]
    assert (folder / "lost.txt").read_text(encoding="utf-8").splitlines() == lines


@pytest.mark.parametrize(
    ("chosen", "outcome", "name", "passed"),
    [
        ("not in_teardown", "FAILED", "test_in_call", {"test_before"}),
        ("not in_call", "ERROR", "test_in_teardown", {"test_before", "test_between", "test_in_teardown"}),
    ],
)
def test_session_ends_without_workers(
    folder: Path, chosen: str, outcome: str, name: str, passed: set[str]
) -> None:
    process = run_pytest(folder, "-p", "no:xdist", "-k", chosen)
    assert process.returncode == 1, process.stdout + process.stderr
    assert outcomes(process.stdout) == {"PASSED": passed, outcome: {name}}
    assert f"the GPU is lost: {ERROR}" in process.stdout
    lines = (folder / "crashes.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"test_loses.py::{name}: {ERROR}"]


@pytest.mark.parametrize(
    ("options", "wrong", "code"),
    [
        (("-p", "no:xdist"), 3, MOST_ARE_WRONG),
        (("-p", "no:xdist"), 2, 1),
        (("-p", "no:xdist"), 0, 0),
        (("-n", "1"), 3, MOST_ARE_WRONG),
    ],
)
def test_where_most_are_wrong_the_code_says_so(
    folder: Path, options: tuple[str, ...], wrong: int, code: int
) -> None:
    test = (
        f"import pytest\n\n@pytest.mark.parametrize('n', range(4))\ndef test(n):\n    assert n >= {wrong}\n"
    )
    (folder / "test_loses.py").write_text(test, encoding="utf-8")
    assert run_pytest(folder, *options).returncode == code
    assert not (folder / "crashes.txt").exists()  # as the GPU answers
