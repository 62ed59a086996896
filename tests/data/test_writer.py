"""Synthetic rooms on disk: what is read back is what was rendered; all of the folder appears, or nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_rooms import COUNT, SETTINGS, SIZE, TASKS

from degmix.data import NYUD, DataError
from degmix.data.synthetic import CLASSES, render, write
from degmix.data.synthetic import writer as writer_module

LAYOUT = {"images", "segmentation", "edge", "normals", "depth", "human_parts", "sal", "gt_sets"}


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_round_trip(rooms):
    """Labels and depth exactly, normals to 8 bits."""
    names = []
    for split in ("train", "val"):
        dataset = NYUD(rooms, split, TASKS, classes=len(CLASSES))
        for sample in dataset:
            names.append(sample["name"])
            scene = render((SETTINGS["seed"], int(sample["name"])), *SIZE)
            np.testing.assert_array_equal(sample["image"] * 255, scene["image"].transpose(2, 0, 1))
            for task in ("semseg", "human_parts", "sal"):
                np.testing.assert_array_equal(sample[task], scene[task])
            for task in ("edge", "depth"):
                np.testing.assert_array_equal(sample[task][0], scene[task])
            normals = sample["normals"].permute(1, 2, 0).numpy()
            np.testing.assert_allclose(normals, scene["normals"], atol=0.008)
            np.testing.assert_array_equal((normals == 0).all(axis=-1), scene["depth"] == 0)
    assert sorted(names) == [f"{index:05d}" for index in range(COUNT)]


def test_files_do_not_depend_on_the_number_of_workers(rooms, tmp_path):
    again = write(tmp_path / "again", COUNT, SIZE, workers=2, **SETTINGS)
    assert contents(again) == contents(rooms)
    other = write(tmp_path / "other", 1, SIZE, seed=4, workers=1)
    assert contents(other)["images/00000.png"] != contents(rooms)["images/00000.png"]


def test_progress_counts_every_room(tmp_path):
    calls = []
    write(tmp_path / "rooms", 3, (16, 20), workers=1, progress=lambda *counts: calls.append(counts))
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(1, 0.5, (1, 0)), (2, 0.01, (1, 1)), (2, 0.99, (1, 1)), (3, 0, (3, 0))],
)
def test_both_splits_get_rooms(tmp_path, count, fraction, expected):
    root = write(tmp_path / "rooms", count, (16, 16), val_fraction=fraction, workers=1)
    sizes = tuple(len((root / "gt_sets" / f"{split}.txt").read_text().split()) for split in ("train", "val"))
    assert sizes == expected


def test_an_empty_folder_may_be_written_to(tmp_path):
    out = tmp_path / "new" / "rooms"
    out.mkdir(parents=True)
    write(out, 1, (16, 16), workers=1)
    assert {p.name for p in out.iterdir()} == LAYOUT
    assert [p.name for p in out.parent.iterdir()] == ["rooms"], "no temporary folder is left"


def test_a_folder_with_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(DataError, match="expected a new or empty folder"):
        write(tmp_path, 1, (16, 16), workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="taken: expected a new or empty folder to write to, got a file"):
        write(tmp_path / "taken", 1, (16, 16), workers=1)
    with pytest.raises(DataError, match="cannot be created"):
        write(tmp_path / "taken" / "rooms", 1, (16, 16), workers=1)


def test_nothing_is_left_when_rendering_fails(tmp_path, monkeypatch):
    def fail(seed, height, width):
        if seed[1] == 1:
            raise KeyboardInterrupt
        return render(seed, height, width)

    monkeypatch.setattr(writer_module, "render", fail)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "rooms", 3, (16, 16), workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count: expected at least 1, got 0"),
        ({"size": (0, 16)}, "height: expected at least 16, got 0"),
        ({"size": (16, 8)}, "width: expected at least 16, got 8"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"val_fraction": 1.0}, "val_fraction: expected a number from 0 to below 1, got 1.0"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "rooms", **{"count": 1, "size": (16, 16), "workers": 1, **arguments})
    assert list(tmp_path.iterdir()) == []
