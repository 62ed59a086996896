"""Files a run leaves behind: its checkpoint (to resume) and its model (to use).

Every file is written beside its place and then moved there, so a reader or a crash never meets half of one.
Only tensors and plain values are read back: a file with anything else pickled inside is refused, not run.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from degmix import build
from degmix.config import Config, config_from_json, config_to_json
from degmix.files import atomic_file

FORMAT = "degmix-1"
CHECKPOINT_NAME = "checkpoint.pt"
MODEL_NAME = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence that names the file."""


def save_model(path: Path, model: nn.Module, config: Config) -> None:
    """Write a model with its configuration as safetensors; the file is all that ``load_model`` needs."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_file(path) as file:
        file.write(safetensors_bytes(tensors, {"format": FORMAT, "config": config_to_json(config)}))


def save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, config: Config
) -> None:
    """Write everything that training continues from after ``step`` steps."""
    state = {
        "format": FORMAT,
        "config": config_to_json(config),
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with atomic_file(path) as file:
        torch.save(state, file)


def restore_state(
    path: Path, state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Put a state of ``read_state`` back into model, optimiser and random generators; returns its step."""
    load_weights(path, model, state["model"])
    try:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its optimizer or generator state does not fit: {error}") from error
    # A run may move to a machine with other GPUs; their generators then start anew.
    if len(state["cuda_rng"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["step"]


def read_state(path: Path) -> tuple[dict[str, Any], Config]:
    """A checkpoint of ``save_state`` and its configuration.

    Raises:
        CheckpointError: if the file is missing, something else, or more than tensors and plain values.
    """
    state = read_pickle(path)
    expected = {"format", "config", "step", "model", "optimizer", "rng", "cuda_rng"}
    if not isinstance(state, dict) or state.get("format") != FORMAT or not expected <= state.keys():
        raise CheckpointError(f"{path}: expected a checkpoint of degmix train, got another kind of file")
    kinds = {"config": str, "step": int, "model": dict, "optimizer": dict, "rng": Tensor, "cuda_rng": list}
    for name, kind in kinds.items():
        if not isinstance(state[name], kind):
            got = type(state[name]).__name__
            raise CheckpointError(f"{path}: {name}: expected {kind.__name__}, got {got}")
    if not all(isinstance(tensor, Tensor) for tensor in state["model"].values()):
        raise CheckpointError(f"{path}: model: expected tensors by name, got other values too")
    config = config_from_json(state["config"], str(path))
    if not 0 <= state["step"] <= config.train.steps:
        raise CheckpointError(
            f"{path}: step: expected 0 to the run's {config.train.steps}, got {state['step']}"
        )
    return state, config


def load_model(path: Path, expected_tasks: Mapping[str, int] | None = None) -> tuple[nn.Module, Config]:
    """A saved model, in eval mode on the CPU, and its configuration.

    Args:
        path: a file of ``save_model`` (``.safetensors``) or of ``save_state``.
        expected_tasks: channels per task the caller needs.

    Raises:
        CheckpointError: if the file is missing, not a model of ours, of other tasks, or does not fit.
    """
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        if metadata.get("format") != FORMAT or "config" not in metadata:
            raise CheckpointError(
                f"{path}: expected a model saved by degmix, got safetensors without its configuration"
            )
        config = config_from_json(metadata["config"], str(path))
    else:
        state, config = read_state(path)
        tensors = state["model"]
    tasks = build.channels(config)
    if expected_tasks is not None and dict(expected_tasks) != tasks:
        raise CheckpointError(
            f"{path}: expected a model of {_name(expected_tasks)}, got one of {_name(tasks)}"
        )
    model = build.build_model(config, load_weights=False)
    load_weights(path, model, tensors)
    return model.eval(), config


def load_weights(path: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict into a model, strictly; ``path`` is named in errors."""
    expected = model.state_dict()
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected := [name for name in tensors if name not in expected]:
        problems.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    shapes = [
        f"{name}: expected {tuple(expected[name].shape)}, got {tuple(tensors[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_some(shapes)})")
    if problems:
        raise CheckpointError(f"{path}: its tensors do not fit the model: {', '.join(problems)}")
    model.load_state_dict(tensors)


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is only tensors and plain values.

    Raises:
        CheckpointError: if the file is missing, damaged, or would run code.
    """
    _expect_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        with path.open("rb") as file:
            saved_by_torch = file.read(2) in (b"PK", b"\x80\x02")
        if not saved_by_torch:
            raise CheckpointError(f"{path}: not a checkpoint, or a damaged one") from None
        raise CheckpointError(
            f"{path}: refused, because it holds pickled objects other than tensors and plain values, "
            "which could run code; nothing of it was run"
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError, IndexError, TypeError, AttributeError):
        # What torch.load raises on damaged files depends on where the damage is.
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one") from None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _expect_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError:
        raise CheckpointError(f"{path}: not a safetensors file, or a damaged one") from None


def _expect_file(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a checkpoint file, got a folder")


def _name(tasks: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count} channel{'s' * (count > 1)})" for name, count in tasks.items())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
