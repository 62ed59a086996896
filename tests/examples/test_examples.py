"""Every example runs to its end, as a person would start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
QUICK = ("train.steps=2", "train.batch_size=2", "model.dim=16", "data.size=[48,64]", "data.workers=0")


def run_example(name: str, *arguments: str | Path) -> str:
    """Run an example in a process of its own, without the interpreter the tests may have switched on."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)  # the packages may be present without being installed
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``train_rooms.py`` has run."""
    out = tmp_path_factory.mktemp("examples") / "rooms"
    run_example("train_rooms.py", "--out", out, "--scenes", "8", *QUICK)
    return out


def test_every_example_is_run_here():
    tested = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.glob("*.py"))


def test_own_module_learns_where_to_look():
    lines = run_example("own_module.py").splitlines()
    first, last = (float(line.rpartition(" ")[2]) for line in (lines[0], lines[-1]))
    assert last < first / 2


def test_gmlp_block_learns():
    lines = run_example("gmlp_block.py").splitlines()
    assert float(lines[-1].rpartition(" ")[2].rstrip("%")) > 90  # by chance 50


def test_swap_op_keeps_the_outputs(torchvision):
    assert "replaced 1 deformable convolution: deform" in run_example("swap_op.py")


def test_train_rooms(rooms):
    assert (rooms / "run" / "model.safetensors").is_file()


def test_train_own_folder(rooms, tmp_path):
    out = tmp_path / "own"
    run_example(
        "train_own_folder.py", rooms / "data", "--classes", "synthetic", "--out", out,
        "model.backbone=tiny", "model.pretrained=false", *QUICK,
    )  # fmt: skip
    assert (out / "model.safetensors").is_file()


def test_predict_picture(rooms, tmp_path):
    picture = next((rooms / "data" / "images").glob("*.png"))
    run_example("predict_picture.py", rooms / "run" / "model.safetensors", picture, "--out", tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 6
