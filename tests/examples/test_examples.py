"""Every example runs to its end, as a person would start it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from contract import environment_without_interpreter

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
QUICK = ("train.steps=2", "train.batch_size=2", "model.dim=16", "data.size=[48,64]", "data.workers=0")
RUN = """
import json, runpy, sys
for name, *arguments in json.loads(sys.argv[1]):
    print("example", name, flush=True)
    sys.argv = [name, *arguments]
    runpy.run_path(name, run_name="__main__")
"""


def run_examples(*calls: tuple[object, ...]) -> dict[str, list[str]]:
    """What examples print. One process runs them, without the interpreter the tests may have switched on."""
    environment = environment_without_interpreter()
    environment["PYTHONPATH"] = str(ROOT)  # the packages may be present without being installed
    command = [sys.executable, "-c", RUN, json.dumps([[str(each) for each in call] for call in calls])]
    done = subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = (part.splitlines() for part in done.stdout.split("example ")[1:])
    return {name: lines for name, *lines in parts}


def test_every_example_is_run_here():
    tested = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.glob("*.py"))


def test_swap_op_keeps_the_outputs(torchvision):
    (lines,) = run_examples(("swap_op.py",)).values()
    assert "replaced 1 deformable convolution: deform" in lines


def test_examples_run_and_learn(tmp_path):
    rooms, own, pictures = (tmp_path / name for name in ("rooms", "own", "pictures"))
    model, picture = rooms / "run/model.safetensors", rooms / "data/images/00000.png"
    tiny = ("--classes", "synthetic", "model.backbone=tiny", "model.pretrained=false")
    printed = run_examples(
        ("own_module.py",),
        ("gmlp_block.py",),
        ("train_rooms.py", "--out", rooms, "--scenes", 8, *QUICK),
        ("train_own_folder.py", rooms / "data", "--out", own, *tiny, *QUICK),
        ("predict_picture.py", model, picture, "--out", pictures),
    )
    first, *_, last = (float(line.rpartition(" ")[2]) for line in printed["own_module.py"])
    assert last < first / 2  # it learns where to look
    assert float(printed["gmlp_block.py"][-1].rpartition(" ")[2].rstrip("%")) > 90  # by chance 50
    assert model.is_file()
    assert (own / "model.safetensors").is_file()
    assert len(list(pictures.glob("*.png"))) == 6
