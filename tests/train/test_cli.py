"""The command line as its users meet it: help, every command, and one sentence for every mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quick_run import QUICK, ROOT, run_degmix, run_here
from small_rooms import SIZE

from degmix import checkpoint, cli
from degmix.tasks import TASKS


def assert_one_sentence(code: int, errors: str, *parts: str) -> None:
    assert code == cli.USER_ERROR
    assert "Traceback" not in errors
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    for part in ("degmix: ", *parts):
        assert part in lines[0]


# --- commands ---


def test_every_command_is_listed_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, listed, _ = run_here(capsys, "--help")
    assert code == 0
    for command in ("demo", "train", "evaluate", "predict", "info", "convert", "data synth"):
        assert re.search(rf"^\W*{command.split()[0]}\b", listed, re.MULTILINE), listed
        code, output, _ = run_here(capsys, *command.split(), "--help")
        assert code == 0
        assert "Usage: " in output


def earlier_demo(out: Path) -> Path:
    """What a run of the demo leaves, as far as the next one looks."""
    out.mkdir(parents=True)
    for name in ("config.yaml", "metrics.json"):
        (out / name).write_text("old")
    return out


def test_the_demo_runs_from_a_checkout(tmp_path: Path) -> None:
    """``python -m degmix demo`` with quick settings replaces an earlier one."""
    out = earlier_demo(tmp_path / "runs/demo")
    result = run_degmix("demo", "--scenes", 8, *QUICK, "train.steps=2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    files = ["metrics.json", "predictions.png", "model.safetensors", "config.yaml", "log.jsonl", "data"]
    assert all((out / name).exists() for name in files)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.keys() == TASKS.keys()
    for name, task in TASKS.items():
        assert metrics[name].keys() == {"metric", "value", "best_constant", "unit", "lower_is_better"}
        assert task.title in result.stdout
    assert "best constant" in result.stdout
    sheet = np.asarray(Image.open(out / "predictions.png"))
    assert sheet.shape[1] > 1000
    assert sheet.std() > 20


def test_the_demo_replaces_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, errors = run_here(capsys, "demo", "--out", tmp_path)
    assert_one_sentence(code, errors, str(tmp_path), "found thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_train_then_evaluate(rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ("train", "--config", "demo", "--out", out, *QUICK, "train.steps=1", f"data.root={rooms}")
    code, output, errors = run_here(capsys, *arguments)
    assert (code, errors) == (0, "")
    assert "degmix evaluate --checkpoint" in output
    code, output, errors = run_here(
        capsys, "evaluate", "--checkpoint", out / "checkpoint.pt", "--out", tmp_path / "metrics.json"
    )
    assert (code, errors) == (0, "")
    assert "pixelF" in output
    assert json.loads((tmp_path / "metrics.json").read_text()).keys() == TASKS.keys()


def test_data_synth_writes_a_readable_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run_here(
        capsys, "data", "synth", "--out", tmp_path / "rooms", "--count", 3, "--size", "16x24"
    )
    assert (code, errors) == (0, "")
    assert Image.open(tmp_path / "rooms/images/00000.png").size == (24, 16)


def test_info_counts_without_allocating(capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run_here(capsys, "info", "--config", "demo", "--size", "960x1280")
    assert code == 0
    assert "GMACs" in output
    assert "MiB" in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"linear1.0.weight": torch.zeros(1)}, "a published DeGMix head"),
        ([1, 2], "other.ckpt: expected a state dict"),
    ],
)
def test_convert_refuses_another_model(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    arguments = (tmp_path / "other.ckpt", tmp_path / "out.safetensors", "--config", "demo")
    code, _, errors = run_here(capsys, "convert", *arguments)
    assert_one_sentence(code, errors, "other.ckpt: expected", message)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("change", ["data.root=elsewhere", "data.classes=[a, b]", "data.size=[8, 8]"])
def test_a_demo_that_cannot_run_leaves_the_earlier_one_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    earlier = earlier_demo(tmp_path / "demo")
    code, _, errors = run_here(capsys, "demo", change, "--out", earlier, "--scenes", 8)
    assert_one_sentence(code, errors)
    left = {path.name: path.read_text() for path in earlier.iterdir()}
    assert left == {"config.yaml": "old", "metrics.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_without_the_extra_the_message_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('No module named typer', name='typer')")
    paths = [str(tmp_path), str(ROOT)]
    program = f"import sys; sys.path[:0] = {paths}; from degmix.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert result.stderr == "degmix: no package typer; install it with: pip install 'degmix[train]'\n"


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train"], ["expected --config FILE, or --resume FOLDER"]),
        (["train", "--config", "nope.yaml"], ["nope.yaml", "no such configuration file or preset", "demo"]),
        (["train", "--config", "demo", "train.lrr=1"], ["train.lrr", "did you mean train.lr?"]),
        (["train", "--config", "demo", "data.size=[0, 64]"], ["data.size", "at least 1", "got 0"]),
        (["train", "--config", "demo", "data.root=/nowhere"], ["/nowhere", "expected a data folder"]),
        (["train", "--resume", "/nowhere"], ["/nowhere/checkpoint.pt", "no such checkpoint"]),
        (["train", "--config", "demo", "--resume", "x"], ["--resume"]),
        (["demo", "model.backbone=resnet9000"], ["model: backbone"]),
        (["demo", "model.attention=psychic"], ["model", "attention", "psychic", "pixel"]),
        (["demo", "--device", "abacus"], ["--device abacus: cannot be used here"]),
        (["demo", "data.classes=cooking"], ["data.classes", "cooking", "synthetic"]),
        (["info", "--size", "0x64"], ["--size", "HEIGHTxWIDTH", "0x64"]),
        (["info", "model.heads=7"], ["heads", "7"]),
        (["data", "synth", "--out", "x", "--size", "big"], ["--size", "HEIGHTxWIDTH", "big"]),
        (["data", "synth", "--out", "x", "--size", "0x10"], ["--size", "0x10"]),
        (["evaluate", "--checkpoint", "/nowhere.pt"], ["/nowhere.pt", "no such checkpoint"]),
        # The output's folder is looked for first.
        (["evaluate", "--checkpoint", "/x.pt", "--out", "nowhere/m.json"], ["there is no folder", "nowhere"]),
        (["evaluate", "--checkpoint", "/x.pt", "--out", "."], ["expected a file, there is a folder"]),
        (["predict", "x.png", "--checkpoint", "/nowhere.pt"], ["/nowhere.pt", "no such checkpoint"]),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_here(capsys, *arguments)
    assert_one_sentence(code, errors, *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_data_set_is_one_sentence(
    spoilt: Path, run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One kind of damage; tests/data/test_nyud.py has the others."""
    path = spoilt / "segmentation" / f"{(spoilt / 'gt_sets/val.txt').read_text().split()[0]}.png"
    Image.fromarray(np.full(SIZE, 99, dtype=np.uint8)).save(path)
    model = run_folder / checkpoint.MODEL_NAME
    code, _, errors = run_here(
        capsys, "evaluate", "--checkpoint", model, "--data", spoilt, "--out", tmp_path / "metrics.json"
    )
    assert_one_sentence(code, errors, str(path), "expected")
    assert not (tmp_path / "metrics.json").exists()


def test_a_corrupt_training_image_is_one_sentence_with_workers_too(
    spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (spoilt / "images").iterdir():
        path.write_bytes(b"no image")
    for workers in (0, 1):
        out = tmp_path / f"run{workers}"
        arguments = ["train", "--config", "demo", "--out", out, *QUICK, f"data.root={spoilt}"]
        code, _, errors = run_here(capsys, *arguments, f"data.workers={workers}")
        assert_one_sentence(code, errors, "images", "expected a readable image")
        assert not out.exists()


def test_a_checkpoint_of_other_tasks_is_one_sentence(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run_folder / checkpoint.MODEL_NAME
    code, _, errors = run_here(capsys, "evaluate", "--checkpoint", model, "--config", "nyud_swin_t")
    assert_one_sentence(code, errors, str(model), "expected a model of semseg (40 channels)", "human_parts")


def test_one_bad_image_among_good_ones_leaves_nothing(
    rooms: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = next((rooms / "images").iterdir())
    for bad, content in (
        ("missing.png", None),
        ("text.png", b"no image"),
        ("half.png", good.read_bytes()[:99]),
    ):
        if content is not None:
            (tmp_path / bad).write_bytes(content)
        out = tmp_path / "out"
        arguments = ("predict", good, tmp_path / bad, "--checkpoint", run_folder / checkpoint.MODEL_NAME)
        code, _, errors = run_here(capsys, *arguments, "--out", out)
        assert_one_sentence(code, errors, bad)
        assert not out.exists()
