"""Checkpoints: written whole or not at all, read without running anything, strict about what they hold."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from malice import Malice
from quick_run import quick_config
from rich.console import Console
from safetensors.torch import load_file, save_file

from degmix import build, checkpoint, train
from degmix.checkpoint import CheckpointError
from degmix.files import atomic_file


def test_a_saved_model_needs_only_its_file(rooms: Path, run_folder: Path, tmp_path: Path) -> None:
    alone = shutil.copy(run_folder / checkpoint.MODEL_NAME, tmp_path / "alone.safetensors")
    model, config = checkpoint.load_model(Path(alone))
    assert config == quick_config(rooms)
    assert not model.training
    from_checkpoint, _ = checkpoint.load_model(run_folder / checkpoint.CHECKPOINT_NAME)
    image = torch.randn(1, 3, 32, 48)
    for task, logits in model(image).items():
        assert torch.equal(logits, from_checkpoint(image)[task])


@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors", "evil.ckpt"])
@pytest.mark.parametrize("by_torch", [True, False])
def test_a_malicious_pickle_never_runs(name: str, by_torch: bool, tmp_path: Path) -> None:
    path, trap = tmp_path / name, tmp_path / "trap"
    if by_torch:
        torch.save({"format": checkpoint.FORMAT, "model": Malice(trap)}, path)
    else:
        path.write_bytes(pickle.dumps(Malice(trap), protocol=2))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_model(path)
    assert str(path) in str(caught.value)
    if not name.endswith("safetensors"):
        assert "refused" in str(caught.value)
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello, this is no checkpoint", bytes(200)])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_other_files_are_refused(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"or a damaged one$"):
        checkpoint.load_model(path)


@pytest.mark.parametrize("name", [checkpoint.MODEL_NAME, checkpoint.CHECKPOINT_NAME])
@pytest.mark.parametrize("kept", [0.3, 0.99])
def test_truncated_files_are_refused(run_folder: Path, name: str, kept: float, tmp_path: Path) -> None:
    whole = (run_folder / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=r"or a damaged one$"):
        checkpoint.load_model(path)


def test_files_of_others_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="safetensors without its configuration"):
        checkpoint.load_model(tmp_path / "other.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="a checkpoint of degmix train, got another kind of file"):
        checkpoint.load_model(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load_model(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="got a folder"):
        checkpoint.load_model(tmp_path)


def test_another_task_set_is_named(run_folder: Path) -> None:
    wanted = r"expected a model of semseg \(40 channels\), depth \(1 channel\), got one of semseg \("
    with pytest.raises(CheckpointError, match=wanted):
        checkpoint.load_model(run_folder / checkpoint.MODEL_NAME, {"semseg": 40, "depth": 1})


def test_tensors_that_do_not_fit_are_named(rooms: Path, run_folder: Path, tmp_path: Path) -> None:
    config = quick_config(rooms)
    model = build.build_model(config)
    weights = load_file(run_folder / checkpoint.MODEL_NAME)
    first, second, *_ = (name for name in weights if weights[name].dim() == 4)
    weights["extra"] = weights.pop(first)
    weights[second] = weights[second][:-1]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_weights(tmp_path / "x", model, weights)
    message = str(caught.value)
    assert f"1 missing ({first}), 1 unexpected (extra), 1 of another shape ({second}: expected" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_during_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    """The process dies with half of the new file written and flushed."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        with atomic_file(path) as file:
            file.write(b"half")
            file.flush()
            os._exit(9)
    os.waitpid(child, 0)
    assert path.read_bytes() == b"old"
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("config", 5, "config: expected str, got int"),
        ("step", "a", "step: expected int, got str"),
        ("step", 10**9, "step: expected 0 to the run's 6, got 1000000000"),
        ("model", 3, "model: expected dict, got int"),
        ("model", {"a": 1}, "model: expected tensors by name"),
        ("optimizer", 3, "optimizer: expected dict, got int"),
        ("optimizer", {}, "optimizer or generator state does not fit"),
        ("rng", torch.zeros(3), "optimizer or generator state does not fit"),
        ("cuda_rng", None, "cuda_rng: expected list, got NoneType"),
    ],
)
def test_damaged_fields_are_named(
    run_folder: Path, field: str, value: object, message: str, tmp_path: Path
) -> None:
    state = torch.load(run_folder / checkpoint.CHECKPOINT_NAME, weights_only=True)
    torch.save({**state, field: value}, tmp_path / checkpoint.CHECKPOINT_NAME)
    with pytest.raises(CheckpointError, match=message):
        train.resume(tmp_path, torch.device("cpu"), Console(quiet=True))


def test_a_restored_state_draws_the_same_random_numbers(rooms: Path, tmp_path: Path) -> None:
    """Backbones with stochastic depth draw from the global generator."""
    config = quick_config(rooms)
    model = build.build_model(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / checkpoint.CHECKPOINT_NAME
    checkpoint.save_state(path, model, optimizer, 1, config)
    expected = torch.rand(3)
    checkpoint.restore_state(path, checkpoint.read_state(path)[0], model, optimizer)
    assert torch.equal(torch.rand(3), expected)
