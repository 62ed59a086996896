"""What the tests of this folder share: the smallest configuration, and ``degmix`` as its users start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from degmix import cli
from degmix.config import Config, load_config

ROOT = Path(__file__).parents[2]
QUICK = (
    "data.size=[32, 48]",
    "model.dim=16",
    "train.batch_size=2",
    "train.steps=6",
    "train.checkpoint_every=2",
    "train.log_every=2",
)


def quick_config(rooms: Path, *overrides: str) -> Config:
    """The demo's model at its smallest, on ``rooms``."""
    return load_config("demo", [*QUICK, *overrides]).with_data_root(rooms)


def degmix_command(*arguments: object) -> list[str]:
    """The command line of ``degmix``, from this checkout."""
    return [sys.executable, "-m", "degmix", *map(str, arguments)]


def command_environment() -> dict[str, str]:
    """One thread, so that tests side by side do not fight for cores; no interpreter, as users have it."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }


def run_degmix(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``degmix`` as a user would, in a process of its own."""
    return subprocess.run(
        degmix_command(*arguments),
        capture_output=True,
        text=True,
        env=command_environment(),
        cwd=cwd,
        timeout=300,
    )


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """``degmix`` in this process, which spares the imports: exit code, output, errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["degmix", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        patch.setattr(cli, "console", cli.Console(width=200))
        with pytest.raises(SystemExit) as stopped:
            cli.run()
    captured = capsys.readouterr()
    code = stopped.value.code
    return (0 if code is None else code), captured.out, captured.err
