"""The NYUD-v2 reader: types, ignore rules, and one clear sentence for every kind of bad input."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malice import Malice
from PIL import Image
from small_rooms import SIZE, TASKS

from degmix.data import NYUD, DataError
from degmix.data.nyud import CLASSES, read_normals
from degmix.data.synthetic import CLASSES as ROOM_CLASSES
from degmix.data.synthetic.writer import encode_normals

NAME = "00000"


def first(root: Path, *tasks: str, classes: int = len(ROOM_CLASSES)) -> dict:
    return NYUD(root, "train", tasks, classes=classes)[0]


def save(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


def test_forty_classes():
    assert len(CLASSES) == len(set(CLASSES)) == 40


def test_sample_types(rooms):
    sample = first(rooms, *TASKS)
    height, width = SIZE
    expected = {
        "image": (torch.float32, (3, height, width)),
        "semseg": (torch.int64, (height, width)),
        "depth": (torch.float32, (1, height, width)),
        "normals": (torch.float32, (3, height, width)),
        "edge": (torch.float32, (1, height, width)),
        "human_parts": (torch.int64, (height, width)),
        "sal": (torch.int64, (height, width)),
    }
    assert {k: (v.dtype, tuple(v.shape)) for k, v in sample.items() if k != "name"} == expected
    assert sample["name"] == NAME


def test_only_the_wanted_tasks_are_read(spoilt):
    for folder in ("depth", "sal", "human_parts", "normals", "edge"):
        for path in (spoilt / folder).iterdir():
            path.unlink()
    assert set(first(spoilt, "semseg")) == {"image", "name", "semseg"}


def test_reading_writes_nothing(rooms):
    before = {p: p.stat().st_mtime_ns for p in rooms.rglob("*")}
    list(NYUD(rooms, "train", TASKS))
    assert {p: p.stat().st_mtime_ns for p in rooms.rglob("*")} == before


def test_published_coding_of_semseg(spoilt):
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[0, :3] = 1, 40, 255
    save(spoilt / "segmentation" / f"{NAME}.png", labels)
    semseg = first(spoilt, "semseg", classes=40)["semseg"]
    assert semseg[0, :4].tolist() == [0, 39, 255, 255]


def test_a_palette_label_is_read_as_labels(spoilt):
    labels = Image.fromarray(np.full(SIZE, 2, dtype=np.uint8), mode="P")
    labels.putpalette([200] * 768)
    labels.save(spoilt / "segmentation" / f"{NAME}.png")
    assert (first(spoilt, "semseg")["semseg"] == 1).all()


def test_unknown_depth(spoilt):
    depth = np.ones(SIZE)
    depth[0, :4] = 0, -1, np.nan, np.inf
    np.save(spoilt / "depth" / f"{NAME}.npy", depth)
    read = first(spoilt, "depth")["depth"]
    assert read[0, 0, :5].tolist() == [0, 0, 0, 0, 1]


@given(vector=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: np.linalg.norm(v) > 1e-3))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_normals_survive_eight_bits(vector, tmp_path):
    normal = np.float32(vector / np.linalg.norm(vector))
    pixels = encode_normals(np.stack([normal, np.zeros(3)])[None])
    for unknown in (pixels[0, 1], [127, 128, 127], [0, 0, 0]):
        pixels[0, 1] = unknown
        save(tmp_path / "normals.png", pixels)
        read = read_normals(tmp_path / "normals.png")[:, 0].numpy()
        np.testing.assert_allclose(np.linalg.norm(read[:, 0]), 1, atol=1e-6)
        np.testing.assert_allclose(read[:, 0], normal, atol=0.008)
        assert (read[:, 1] == 0).all()


def spoil(path: Path, content: object) -> None:
    """Remove a file, cut it after so many bytes, or write bytes, a picture or an array in its place."""
    if content is None:
        path.unlink()
    elif isinstance(content, int):
        os.truncate(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".npy":
        np.save(path, content, allow_pickle=True)
    else:
        save(path, content)


LIST, IMAGE, DEPTH = "gt_sets/train.txt", f"images/{NAME}.png", f"depth/{NAME}.npy"
LABELS, PARTS = f"segmentation/{NAME}.png", f"human_parts/{NAME}.png"
CORRUPT_IMAGE = "expected a readable image, got a corrupt file"
CORRUPT_ARRAY = r"expected a readable \.npy array, got a corrupt file"
CASES = {
    "no list": (LIST, None, r"expected a list of names, got nothing there \(splits found: val\)"),
    "empty list": (LIST, b"\n \n", "expected at least one name, got an empty list"),
    "binary list": (LIST, b"\xff\xfe\x00", "expected a text file of names"),
    "no image": (IMAGE, None, r"expected a file, got nothing there \(1 of 6 files of the split are"),
    "no label": (DEPTH, None, "expected a file, got nothing there"),
    "corrupt image": (IMAGE, b"no picture", CORRUPT_IMAGE),
    "empty image": (IMAGE, b"", CORRUPT_IMAGE),
    "truncated label": (f"normals/{NAME}.png", 300, CORRUPT_IMAGE),
    "16 bits": (IMAGE, np.zeros(SIZE, np.uint16), "expected an 8-bit image of mode RGB, got mode I;16"),
    "colour": (LABELS, np.zeros((*SIZE, 3), np.uint8), "expected an 8-bit image of mode L, got mode RGB"),
    "size": (f"sal/{NAME}.png", np.zeros((48, 60), np.uint8), "expected the image's size 48×64, got 48×60"),
    "a class too many": (LABELS, np.full(SIZE, 14, np.uint8), "expected labels from 0 to 13, got 14"),
    "a part too many": (PARTS, np.full(SIZE, 7, np.uint8), "expected labels from 0 to 6, got 7"),
    "truncated array": (DEPTH, 200, CORRUPT_ARRAY),
    "empty array": (DEPTH, b"", CORRUPT_ARRAY),
    "array of objects": (DEPTH, np.array([Malice("ran")], object), r"expected a readable \.npy array"),
    "pickle": (DEPTH, pickle.dumps(Malice("ran")), r"expected a readable \.npy array"),
    "array of text": (DEPTH, np.full(SIZE, "far"), "expected an array of real numbers, got <U3"),
    "one dimension": (DEPTH, np.zeros(9), r"expected an array of 2 dimensions, got shape \(9,\)"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_named(spoilt, case, monkeypatch):
    file, content, message = CASES[case]
    monkeypatch.chdir(spoilt)
    spoil(spoilt / file, content)
    with pytest.raises(DataError, match=re.escape(file).replace("/", ".") + ": " + message) as caught:
        first(spoilt, *TASKS)
    assert "\n" not in str(caught.value)
    assert not (spoilt / "ran").exists(), "no pickle was run"


def test_missing_folders_are_named(spoilt):
    os.rename(spoilt / "edge", spoilt / "egde")
    with pytest.raises(DataError, match=r"edge: expected a folder of \.png files, got nothing there"):
        first(spoilt, *TASKS)
    with pytest.raises(DataError, match="elsewhere: expected a data folder, got nothing"):
        first(spoilt.with_name("elsewhere"), *TASKS)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a\\b", "C:x", "a\x00b", "sub/00000"])
def test_names_cannot_lead_out_of_the_folder(spoilt, name):
    (spoilt / "gt_sets" / "train.txt").write_text(f"{NAME}\n{name}\n", newline="\n")
    with pytest.raises(DataError, match=r"train\.txt: expected plain file names"):
        NYUD(spoilt, "train", ["semseg"])


@pytest.mark.parametrize("split", ["../train", "", "test"])
def test_unknown_split(rooms, split):
    with pytest.raises(DataError, match=r"splits found: train, val"):
        NYUD(rooms, split, ["semseg"])


def test_bad_arguments(rooms):
    with pytest.raises(DataError, match=r"task: expected one of semseg, .*, got 'segmentation'"):
        NYUD(rooms, "train", ["segmentation"])
    with pytest.raises(DataError, match="classes: expected 1 to 254, got 0"):
        NYUD(rooms, "train", ["semseg"], classes=0)
    with pytest.raises(DataError, match="expected a data folder, got a file"):
        NYUD(rooms / "gt_sets" / "train.txt", "train", ["semseg"])


@given(position=st.integers(0, 3000), value=st.integers(0, 255))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damaged_byte_is_read_or_refused(rooms, tmp_path, position, value):
    """Whatever a byte of the file becomes, no other exception escapes."""
    for folder, ending, task in (("normals", ".png", "normals"), ("depth", ".npy", "depth")):
        root = tmp_path / "fuzz"
        for name in ("images", "gt_sets", folder):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "gt_sets" / "train.txt").write_text(NAME)
        (root / "images" / f"{NAME}.png").write_bytes((rooms / "images" / f"{NAME}.png").read_bytes())
        data = bytearray((rooms / folder / f"{NAME}{ending}").read_bytes())
        data[position % len(data)] = value
        (root / folder / f"{NAME}{ending}").write_bytes(data)
        with contextlib.suppress(DataError):
            assert NYUD(root, "train", [task])[0][task].shape[-2:] == SIZE
