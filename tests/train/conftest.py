"""A quickly trained model, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quick_run import quick_config
from rich.console import Console

from degmix import train
from degmix_kernels import use_backend


@pytest.fixture(scope="session")
def run_folder(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished quick run on the CPU; tests only read it."""
    out = tmp_path_factory.mktemp("run") / "run"
    # A fixture of the session is set up outside the one that gives each test its backend.
    with use_backend("reference"):
        train.start(quick_config(rooms), out, torch.device("cpu"), Console(quiet=True))
    return out
