"""A process that takes its machine for one with an H100: what it launches, and what it leaves for one."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.compiler.resources import PINNED
from bench.gpu import prepare, prepared, pretend, rehearse
from bench.gpu.visits import CONTRACT, PYTEST, VALUES

needs_pinned = pytest.mark.skipif(
    version("triton") != PINNED or platform.machine() != "x86_64" or shutil.which("cc") is None,
    reason=f"it imitates the runtime of Triton {PINNED}, which make test-pinned installs, and needs cc",
)


def check(op: str, work: Path, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    """Check an op in a process that pretends; returns the process and the events of its launches."""
    environment = os.environ | pretend.environment(work, work / "cache") | {"OMP_NUM_THREADS": "1"} | settings
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *PYTEST, CONTRACT, f"-k={VALUES} and {op}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    events = work / "launches.jsonl"
    lines = events.read_text().splitlines() if events.exists() else []
    events.unlink(missing_ok=True)
    return done, [json.loads(line) for line in lines]


@needs_pinned
def test_everything_is_launched_and_found_again(tmp_path: Path) -> None:
    done, events = check("coordinate_bias", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    kernels = [event for event in events if "kernel" in event]
    assert len(kernels) > 10
    assert all(event["compiled"] for event in kernels)
    assert not [event for event in events if "refused" in event]
    entries = {entry for event in events for entry in event["entries"]}
    facts = prepared.pack(tmp_path / "cache", entries, tmp_path / "gpu", "0" * 40, "sources")
    assert facts.kernels == len(kernels)
    assert facts.launchers > 0
    # Another machine: the archive has all that is needed.
    cache = tmp_path / "cache"
    cache.rename(tmp_path / "made")
    prepared.unpack(tmp_path / "gpu", cache)
    done, events = check("coordinate_bias", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    again = [event for event in events if "kernel" in event]
    assert len(again) == len(kernels)
    assert not any(event["compiled"] for event in again)


@needs_pinned
def test_a_rehearsed_crash_is_one(tmp_path: Path) -> None:
    done, _ = check("deform_mix", tmp_path, DEGMIX_FAULTS=json.dumps(rehearse.FAULTS))
    assert done.returncode == -11


def test_a_stage_that_launches_nothing_is_named() -> None:
    planned = list(prepare.commands())
    assert {"ops", "tests", "memcheck", "bench", "model", "profile", "huge", "decide"} == set(planned)
    events = [{"stage": name, "kernel": "forward"} for name in planned]
    assert prepare.silent_stages(events) == []
    assert prepare.silent_stages(events[1:]) == planned[:1]
    assert prepare.silent_stages([{"stage": name, "entries": []} for name in planned]) == planned


def test_a_rehearsal_tells_faults_of_its_own_from_others() -> None:
    summary = (
        "9 s\n  ops          FAILED: code 1\n  memcheck     ok (9 s)\n  bench        stopped when its 9 s\n"
    )
    assert rehearse.broken(summary) == []
    summary += "  racecheck    not run: this machine refuses\n  huge         FAILED: code 1 after 3 s\n"
    assert rehearse.broken(summary) == ["racecheck", "huge"]


def test_another_stack_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(prepare.STACK, "triton", "1.0")
    assert prepare.main() == 2
    assert "the cache is of use to Python 3.12, torch 2.11.0, triton 1.0 only" in capsys.readouterr().err


def test_a_rehearsal_needs_what_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rehearse, "FOLDER", tmp_path)
    assert rehearse.main() == 2
    assert "make gpu-ready prepares it" in capsys.readouterr().err


def test_a_machine_without_a_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="a C compiler is needed"):
        pretend.environment(tmp_path / "work", tmp_path / "cache")
