"""The training loop: resume is exact, stopping is orderly, a bad loss is named, and it learns."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from quick_run import QUICK, command_environment, degmix_command, quick_config, run_here
from rich.console import Console
from safetensors.torch import load_file

from degmix import build, checkpoint, train
from degmix.config import config_to_yaml
from degmix.data import NYUD

CPU = torch.device("cpu")
QUIET = Console(quiet=True)


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / checkpoint.MODEL_NAME)


def assert_same_weights(out: Path, other: Path) -> None:
    weights, others = final_weights(out), final_weights(other)
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def log_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / train.LOG_NAME).read_text().splitlines()]


def logged_steps(out: Path) -> int:
    """Whole lines of the log of a run that may still write."""
    log = out / train.LOG_NAME
    return log.read_text().count("\n") if log.exists() else 0


def without_speed(lines: list[dict]) -> list[dict]:
    speed = ("images_per_second", "waiting_for_data")
    return [{key: value for key, value in line.items() if key not in speed} for line in lines]


def test_a_run_leaves_its_files(run_folder: Path) -> None:
    files = {"config.yaml", "log.jsonl", "checkpoint.pt", "model.safetensors"}
    assert {path.name for path in run_folder.iterdir()} == files
    lines = log_lines(run_folder)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[0]["losses"].keys() == {"semseg", "human_parts", "sal", "depth", "normals", "edge"}
    assert lines[0]["loss"] == pytest.approx(sum(lines[0]["losses"].values()))
    assert all(0 < line["waiting_for_data"] < 1 for line in lines)


def test_same_seed_same_weights_and_another_seed_others(
    rooms: Path, run_folder: Path, tmp_path: Path
) -> None:
    train.start(quick_config(rooms), tmp_path / "same", CPU, QUIET)
    assert_same_weights(tmp_path / "same", run_folder)
    train.start(quick_config(rooms, "train.seed=1", "train.steps=1"), tmp_path / "other", CPU, QUIET)
    weights = final_weights(tmp_path / "other")
    name = next(name for name in weights if name.endswith(".weight") and weights[name].dim() == 4)
    assert not torch.equal(weights[name], final_weights(run_folder)[name])


def test_killed_and_resumed_equals_uninterrupted(rooms: Path, tmp_path: Path) -> None:
    """SIGKILL between two checkpoints, then resume to the end: the same weights and the same log."""
    config = quick_config(rooms, "train.steps=12", "train.checkpoint_every=3", "train.log_every=1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.start(config, whole, CPU, QUIET)

    source = tmp_path / "config.yaml"
    source.write_text(config_to_yaml(config))
    command = degmix_command("train", "--config", source, "--out", killed, "--device", "cpu")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # other numbers round sums differently
    process = subprocess.Popen(command, env=command_environment() | threads)
    deadline = time.monotonic() + 120
    while logged_steps(killed) < 4:
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline, "no step 4 within two minutes"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (killed / checkpoint.MODEL_NAME).exists(), "the run ended before it was killed"
    train.resume(killed, CPU, QUIET)

    assert_same_weights(whole, killed)
    assert without_speed(log_lines(killed)) == without_speed(log_lines(whole))
    assert [line["step"] for line in log_lines(killed)] == list(range(1, 13))


def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = (*QUICK, "train.steps=1000", "train.checkpoint_every=1000", "train.log_every=1")
    out = tmp_path / "run"
    arguments = ("--config", "demo", "--out", out, "--device", "cpu", *changes, f"data.root={rooms}")
    with signal_after(out, 2, signal.SIGTERM):
        code, output, errors = run_here(capsys, "train", *arguments)
    assert (code, errors) == (130, "")
    assert f"go on with: degmix train --resume {out}" in output
    state, _ = checkpoint.read_state(out / checkpoint.CHECKPOINT_NAME)
    assert state["step"] == log_lines(out)[-1]["step"] >= 2


def test_accumulation_reads_on_in_the_stream(rooms: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    changes = ("train.steps=4", "train.accumulate=2")
    train.start(quick_config(rooms, *changes), whole, CPU, QUIET)
    first = quick_config(rooms, *changes, "train.checkpoint_every=3", "train.log_every=1")
    with signal_after(stopped, 1, signal.SIGINT), pytest.raises(train.Interrupted):
        train.start(first, stopped, CPU, QUIET)
    train.resume(stopped, CPU, QUIET)
    assert_same_weights(whole, stopped)


@contextmanager
def signal_after(out: Path, steps: int, number: signal.Signals) -> Iterator[None]:
    """Send this process a signal once the log of the run has so many lines."""

    def watch() -> None:
        while logged_steps(out) < steps:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()


def test_a_nan_loss_stops_and_names_its_task(
    rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick_config(rooms)
    steps_seen = 0

    def build_losses(config):
        losses = original(config)

        def depth(logits, target):
            nonlocal steps_seen
            steps_seen += 1
            return losses["depth"](logits, target) * (math.nan if steps_seen == 4 else 1)

        return {**losses, "depth": depth}

    original = build.build_losses
    monkeypatch.setattr(build, "build_losses", build_losses)
    out = tmp_path / "run"
    message = "the loss of depth is nan at step 4; the checkpoint before it"
    with pytest.raises(train.TrainingError, match=message):
        train.start(config, out, CPU, QUIET)
    state, _ = checkpoint.read_state(out / checkpoint.CHECKPOINT_NAME)
    assert state["step"] == 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert not (out / checkpoint.MODEL_NAME).exists()
    monkeypatch.undo()
    train.resume(out, CPU, QUIET)
    assert (out / checkpoint.MODEL_NAME).exists()


def test_an_exploding_learning_rate_is_stopped(rooms: Path, tmp_path: Path) -> None:
    config = quick_config(rooms, "train.lr=1e30", "train.clip=null")
    message = r"(the loss of .* is|the norm of the gradient is) (nan|inf)"
    with pytest.raises(train.TrainingError, match=message):
        train.start(config, tmp_path / "run", CPU, QUIET)


def test_one_image_per_batch_trains(rooms: Path, tmp_path: Path) -> None:
    train.start(quick_config(rooms, "train.batch_size=1", "train.steps=2"), tmp_path / "run", CPU, QUIET)
    assert all(tensor.isfinite().all() for tensor in final_weights(tmp_path / "run").values())


def test_workers_and_a_cache_do_not_change_the_samples(rooms: Path, run_folder: Path, tmp_path: Path) -> None:
    changed = quick_config(rooms, "data.cache=true", "data.workers=2")
    train.start(changed, tmp_path / "run", CPU, QUIET, seconds=1000)  # time enough
    assert_same_weights(tmp_path / "run", run_folder)


def test_a_cached_data_set_is_read_once(rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, original = [], NYUD.__getitem__
    monkeypatch.setattr(NYUD, "__getitem__", lambda self, index: read.append(index) or original(self, index))
    train.start(quick_config(rooms, "data.cache=true"), tmp_path / "run", CPU, QUIET)
    assert [index for index in read if index < 6] == list(range(6))


def test_the_log_says_how_long_steps_waited_for_data(
    rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train._batches

    def late(config, first_step):
        for batch in original(config, first_step):
            time.sleep(0.3)
            yield batch

    monkeypatch.setattr(train, "_batches", late)
    train.start(quick_config(rooms, "train.log_every=1"), tmp_path / "run", CPU, QUIET)
    lines = log_lines(tmp_path / "run")
    for line in lines[1:]:  # the first batch is read before the clock starts
        seconds = line["step"] * 2 / line["images_per_second"]
        assert 0.3 * (line["step"] - 1) <= line["waiting_for_data"] * seconds < seconds


def test_a_run_stops_when_its_time_is_over_and_goes_on(rooms: Path, run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(train.OutOfTime, match="stopped after step 1 of 6; go on with: degmix train --resume"):
        train.start(quick_config(rooms), out, CPU, QUIET, seconds=0)
    train.resume(out, CPU, QUIET)
    assert_same_weights(out, run_folder)


def test_a_run_is_not_overwritten(rooms: Path, run_folder: Path) -> None:
    with pytest.raises(train.TrainingError, match="holds a run already"):
        train.start(quick_config(rooms), run_folder, CPU, QUIET)


def test_the_learning_rate_falls_polynomially(rooms: Path) -> None:
    config = quick_config(rooms, "train.steps=100", "train.lr=0.5")
    assert train.learning_rate(config, 0) == 0.5
    assert train.learning_rate(config, 75) == pytest.approx(0.5 * 0.25**0.9)


def test_it_learns(rooms: Path, tmp_path: Path) -> None:
    config = quick_config(rooms, "tasks=[depth]", "train.steps=30", "train.log_every=1")
    train.start(config, tmp_path / "run", CPU, QUIET)
    losses = [line["losses"]["depth"] for line in log_lines(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
