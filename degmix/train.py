"""Training: one loop.

What happens at a step depends only on the configuration and the step: the samples are a function of the seed
and their position, the learning rate of the step. A checkpoint adds weights, momentum and the random
generators, so a resumed run computes what the uninterrupted one would have, on a CPU bit for bit.
"""

from __future__ import annotations

import itertools
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from degmix import build, checkpoint
from degmix.config import Config, config_to_yaml
from degmix.data import DataError, Sample
from degmix.data.stream import TrainingStream
from degmix.data.transforms import training_transform
from degmix.files import atomic_file
from degmix.progress import stage

CONFIG_NAME = "config.yaml"
LOG_NAME = "log.jsonl"


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one sentence."""


class Interrupted(Exception):
    """The user or the system asked the run to stop; the message says how to go on."""


class OutOfTime(Interrupted):
    """The time that the run was given is over."""


def default_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def start(
    config: Config, out: Path, device: torch.device, console: Console, seconds: float | None = None
) -> None:
    """Train from scratch into the new run folder ``out``.

    It gets config.yaml, log.jsonl, checkpoint.pt and model.safetensors. A line of the log has the step, the
    losses, the learning rate, the norm of the gradient and, counted since the start of the call, images per
    second and the share of the time that went by waiting for them (``waiting_for_data``).

    Args:
        config: what to train, on what.
        out: the run folder.
        device: where to train.
        console: where to show progress.
        seconds: time after which the run stops as if interrupted, after one step at least; as long as it
            takes by default.

    Raises:
        ConfigError, DataError: if the configuration describes no model or no data.
        TrainingError: if ``out`` holds a run already, or a loss becomes NaN or infinite.
        Interrupted: after SIGINT or SIGTERM.
        OutOfTime: after ``seconds``.
    """
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    if (out / checkpoint.CHECKPOINT_NAME).exists():
        raise TrainingError(f"{out}: holds a run already; choose another --out, or go on with --resume {out}")
    torch.manual_seed(config.train.seed)
    model = build.build_model(config).to(device)
    _train(config, out, model, build.build_optimizer(config, model), 0, console, deadline)


def resume(out: Path, device: torch.device, console: Console) -> None:
    """Go on with the run in the folder ``out`` from its last checkpoint.

    Raises:
        CheckpointError: if there is no checkpoint to go on from.
        The others: as ``start``.
    """
    path = out / checkpoint.CHECKPOINT_NAME
    state, config = checkpoint.read_state(path)
    model = build.build_model(config, load_weights=False).to(device)
    optimizer = build.build_optimizer(config, model)
    step = checkpoint.restore_state(path, state, model, optimizer)
    _train(config, out, model, optimizer, step, console)


def _train(
    config: Config,
    out: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    first_step: int,
    console: Console,
    deadline: float = math.inf,
) -> None:
    """Train from ``first_step`` on, until ``deadline`` at most; leaves what ``start`` does."""
    settings = config.train
    device = next(model.parameters()).device
    losses_of = build.build_losses(config)
    batches = _batches(config, first_step)
    # Read before anything is written: most of what is wrong with a data set shows in its first batch.
    batches = itertools.chain([next(batches)], batches) if first_step < settings.steps else batches
    out.mkdir(parents=True, exist_ok=True)
    write_config(out, config)
    log = _open_log(out / LOG_NAME, first_step)

    model.train()
    began, waited = time.monotonic(), 0.0
    with (
        log,
        _stop_requested() as stop,
        stage(console, "training", settings.steps, first_step) as advance,
    ):
        for step in range(first_step, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)

            step_losses = torch.zeros(len(config.tasks), device=device)
            for _ in range(settings.accumulate):
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
                with torch.autocast(
                    device.type, torch.bfloat16, enabled=settings.amp and device.type == "cuda"
                ):
                    logits = model(batch["image"])
                losses = torch.stack([losses_of[task](logits[task], batch[task]) for task in config.tasks])
                (losses.sum() / settings.accumulate).backward()
                step_losses += losses.detach() / settings.accumulate

            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
            *values, norm = torch.cat((step_losses, norm[None])).tolist()  # one wait for the GPU
            losses_by_task = dict(zip(config.tasks, values, strict=True))
            _expect_finite(losses_by_task, norm, step, out)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            images = (done - first_step) * settings.batch_size * settings.accumulate
            now = time.monotonic()
            speed = images / (now - began)
            described = "  ".join(f"{task} {value:.3f}" for task, value in losses_by_task.items())
            advance(done, f"{described}  {speed:.1f} images/s")
            if done % settings.log_every == 0 or done == settings.steps:
                record = {"step": done, "loss": sum(values), "losses": losses_by_task}
                record |= {"lr": learning_rate(config, step), "grad_norm": norm}
                record |= {"images_per_second": speed, "waiting_for_data": waited / (now - began)}
                log.write(json.dumps(record) + "\n")
                log.flush()
            late = now >= deadline
            if done % settings.checkpoint_every == 0 or done == settings.steps or stop or late:
                checkpoint.save_state(out / checkpoint.CHECKPOINT_NAME, model, optimizer, done, config)
            if (stop or late) and done < settings.steps:
                raise (Interrupted if stop else OutOfTime)(
                    f"stopped after step {done} of {settings.steps}; go on with: degmix train --resume {out}"
                )
    checkpoint.save_model(out / checkpoint.MODEL_NAME, model, config)


def write_config(out: Path, config: Config) -> None:
    """Write the configuration of a run into its folder."""
    with atomic_file(out / CONFIG_NAME) as file:
        file.write(config_to_yaml(config).encode())


def learning_rate(config: Config, step: int) -> float:
    """Polynomial decay: ``lr · (1 − step / steps) ** power``."""
    return config.train.lr * (1 - step / config.train.steps) ** config.train.power


def _loader(config: Config, first_step: int) -> DataLoader[dict[str, Tensor]]:
    """Training batches from ``first_step`` on."""
    settings = config.train
    dataset = build.open_split(config, "train")
    if config.data.cache:  # read before there are workers, so that forked ones share it
        dataset = list(dataset)
    stream = TrainingStream(
        dataset,
        training_transform(config.data.size, config.data.scales),
        seed=settings.seed,
        batch_size=settings.batch_size,
        start_step=first_step * settings.accumulate,
        steps=settings.steps * settings.accumulate,
    )
    return DataLoader(
        _ErrorsAsValues(stream),
        batch_size=settings.batch_size,
        num_workers=config.data.workers,
        worker_init_fn=_ignore_interrupts,
        collate_fn=partial(_collate, ("image", *config.tasks)),
        # Its own generator: the default one would be drawn from here, and then differ in a resumed run.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.data.workers > 0,
    )


class _ErrorsAsValues(Dataset):
    """A stream that returns a DataError; raised in a worker process, it would arrive as a traceback."""

    def __init__(self, stream: TrainingStream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, item: int) -> Sample | DataError:
        try:
            return self.stream[item]
        except DataError as error:
            return error


def _collate(names: tuple[str, ...], samples: list[Sample | DataError]) -> dict[str, Tensor] | DataError:
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


def _batches(config: Config, first_step: int) -> Iterator[dict[str, Tensor]]:
    """Training batches from ``first_step`` on; raises the DataError of one that cannot be read."""
    for batch in _loader(config, first_step):
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the workers go on until the training process has stopped.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _expect_finite(losses: dict[str, float], norm: float, step: int, out: Path) -> None:
    """Stop before a step that would ruin the weights, so that checkpoints only hold good ones."""
    bad = [f"{task} is {value}" for task, value in losses.items() if not math.isfinite(value)]
    if bad:
        what = f"the loss of {' and of '.join(bad)}"
    elif not math.isfinite(norm):
        what = f"the norm of the gradient is {norm}"
    else:
        return
    path = out / checkpoint.CHECKPOINT_NAME
    kept = (
        f"the checkpoint before it stands in {path}"
        if path.exists()
        else "no checkpoint had been written yet"
    )
    raise TrainingError(f"{what} at step {step + 1}; {kept}; a lower train.lr or a train.clip may help")


def _open_log(path: Path, first_step: int):
    """The log, open to append, without lines later than ``first_step`` or cut short by a crash."""
    kept = []
    if first_step and path.exists():
        for line in path.read_text().splitlines(keepends=True):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record["step"] <= first_step:
                kept.append(line)
    with atomic_file(path) as file:
        file.write("".join(kept).encode())
    return path.open("a")


@contextmanager
def _stop_requested() -> Iterator[list[int]]:
    """A list that receives SIGINT and SIGTERM, so that a step and its checkpoint end before the run does."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # A second request is not to be delayed.
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
