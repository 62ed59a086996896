"""One small data set on disk, shared by the tests of this room; tests that spoil files copy it first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_rooms import COUNT, SIZE

from degmix.data.synthetic import write


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small rooms; not to be changed."""
    return write(tmp_path_factory.mktemp("data") / "rooms", COUNT, SIZE, seed=3, val_fraction=0.34, workers=1)


@pytest.fixture
def spoilt(rooms: Path, tmp_path: Path) -> Path:
    """A copy of the rooms to damage."""
    return Path(shutil.copytree(rooms, tmp_path / "rooms"))
