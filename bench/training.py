"""Training for real: the demo's model on synthetic rooms, with the kernels and with the plain formula.

    python -m bench.training --out runs/training       # at NYUD-v2's size in bf16; meant for a GPU
    python -m bench.training --seconds 300              # the same, as far as it gets in five minutes
    python -m bench.training --quick                    # seconds on a CPU, in fp32, without kernels

Both runs start from the same weights and see the same pictures in the same order. ``--out`` gets two files,
training.json and training.png, written anew after each run, one that was cut short included. Rooms and run
folders are kept with ``--work`` only. Needs what ``pip install '.[test]'`` installs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from torch import Tensor

from bench.cases.deform_conv import load_torchvision
from bench.cases.model import FORMULA
from bench.harness.case import Unavailable
from bench.harness.ceilings import at_work
from bench.harness.command import FAILURE, INTERRUPTED, USER_ERROR, console
from bench.harness.machine import read_machine
from bench.harness.results import OK, OURS, expect_writable
from bench.report.curves import JSON_NAME, PLOT_NAME, Curve, write
from degmix import DeGMixHead, build, train
from degmix.config import Config, ConfigError, load_config
from degmix.data import synthetic
from degmix.data.errors import DataError
from degmix.data.nyud import one_line
from degmix.data.synthetic.writer import usable_cores
from degmix.model.formula import formula
from degmix.progress import stage

STOPPED, LATE = "interrupted", "out of time"
MOST_WORKERS = 14
SHARED_MEMORY = Path("/dev/shm")  # where loader processes leave their batches
BATCHES_OF_A_WORKER = 3  # that are there at once: two ahead, as PyTorch's loader has it, and one in use


@contextmanager
def written_out() -> Iterator[None]:
    """Every head computes the paper's formula with torchvision's operator."""
    ours = DeGMixHead.forward
    DeGMixHead.forward = formula
    try:
        yield
    finally:
        DeGMixHead.forward = ours


def configuration(options: argparse.Namespace, rooms: Path) -> Config:
    """The demo's, at the size and length asked for, reading as fast as it can."""
    height, width = options.size
    config = load_config(
        "demo",
        [
            f"data.size=[{height}, {width}]",
            f"data.workers={options.workers}",
            "data.cache=true",
            f"train.steps={options.steps}",
            f"train.batch_size={options.batch}",
            f"train.amp={str(torch.cuda.is_available()).lower()}",
            "train.log_every=1",
        ],
    ).with_data_root(rooms)
    return replace(config, data=replace(config.data, workers=workers_with_room(config)))


def workers_with_room(config: Config) -> int:
    """As many of the loader's processes as there is shared memory for; one that finds none is killed."""
    if not config.data.workers or not SHARED_MEMORY.is_dir():
        return config.data.workers
    sample = build.open_split(config, "train")[0]
    picture = sum(value.nbytes for value in sample.values() if isinstance(value, Tensor))
    needed = BATCHES_OF_A_WORKER * config.train.batch_size * picture
    return min(config.data.workers, shutil.disk_usage(SHARED_MEMORY).free // needed)


def run(config: Config, folder: Path, device: torch.device, console: Console, seconds: float | None) -> Curve:
    """Train into a new folder, and say what was reached, however it ended."""
    status = OK
    try:
        train.start(config, folder, device, console, seconds)
    except train.OutOfTime:
        status = LATE
    except (train.Interrupted, KeyboardInterrupt):
        status = STOPPED
    except Exception as error:  # of the one run; the other's curve is worth having nevertheless
        traceback.print_exc()
        status = f"failed: {type(error).__name__}: {one_line(error)}"
    return read_curve(folder / train.LOG_NAME, status, config)


def read_curve(log: Path, status: str, config: Config) -> Curve:
    """A run's curve from its log, which may be short or missing."""
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rate = waiting = None
    if len(records) >= 2:
        # The log counts both since the start.
        (before, waited_before), (seconds, waited) = (
            _times(record, config.train.batch_size)
            for record in (records[len(records) // 2 - 1], records[-1])
        )
        images = (len(records) - len(records) // 2) * config.train.batch_size
        rate, waiting = images / (seconds - before), (waited - waited_before) / (seconds - before)
    losses = tuple(record["loss"] for record in records)
    return Curve(status, config.train.steps, len(records), rate, waiting, losses)


def _times(record: dict, batch: int) -> tuple[float, float]:
    """Seconds since the start, and those of waiting among them."""
    seconds = record["step"] * batch / record["images_per_second"]
    return seconds, record["waiting_for_data"] * seconds


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser("python -m bench.training", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/training"), help="a new folder (default: runs/training)")
    add("--work", type=Path, help="a new folder for rooms and run folders (default: they are not kept)")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=(425, 560), help="of the pictures")
    add("--rooms", type=int, default=160, help="rooms to render (default: 160)")
    add("--steps", type=int, default=450, help="steps of each run, at least 2 (default: 450)")
    add("--seconds", type=float, help="time for both runs, half of it for the first (default: until done)")
    add("--batch", type=int, default=8, help="pictures in a step (default: 8)")
    workers = min(MOST_WORKERS, usable_cores())
    add("--workers", type=int, default=workers, help=f"processes that read pictures (default: {workers})")
    add("--quick", action="store_true", help="a few steps with small pictures: shows that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.rooms, options.steps, options.batch, options.workers = (48, 64), 8, 8, 2, 0
    for name, least in (("rooms", 1), ("steps", 2), ("batch", 1), ("workers", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}")
    if options.seconds is not None and not options.seconds > 0:
        parser.error("--seconds: expected more than 0")
    for name, folder in (("out", options.out), ("work", options.work)):
        if folder is not None and folder.exists():
            parser.error(f"--{name} {folder}: exists already")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train twice, and put the curves together; 130 if interrupted, 1 if a run failed, 2 for a mistake."""
    options = parse(arguments)
    shown, device = console(), train.default_device()
    if device.type != "cuda":
        shown.print("No GPU: fp32, and our ops run their references; this says nothing about the kernels.")
    work = nullcontext(options.work) if options.work else TemporaryDirectory(prefix="training-")
    try:
        expect_writable(options.out / JSON_NAME)
    except OSError as error:
        print(f"bench.training: --out: {error}", file=sys.stderr)
        return USER_ERROR
    try:
        load_torchvision(device)  # without it the formula would be something else than people have today
        with work as folder:
            return train_twice(options, Path(folder), device, shown)
    except (Unavailable, ConfigError, DataError) as error:
        print(f"bench.training: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("bench.training: interrupted while nothing was being trained", file=sys.stderr)
        return INTERRUPTED
    finally:
        with suppress(OSError):  # unless there is something in it; an empty one would only be in the way
            options.out.rmdir()


def train_twice(options: argparse.Namespace, work: Path, device: torch.device, console: Console) -> int:
    """Render, and train with our ops, then with the formula; returns the exit code."""
    with stage(console, "rendering", options.rooms) as advance:
        synthetic.write(
            work / "rooms", options.rooms, tuple(options.size), progress=lambda done, _: advance(done, "")
        )
    config = configuration(options, work / "rooms")
    if config.data.workers < options.workers:
        console.print(f"{SHARED_MEMORY} has room for the batches of {config.data.workers} workers only.")
    with at_work(device):
        machine = read_machine(device)
    height, width = options.size
    dtype = "bf16" if device.type == "cuda" else "fp32"
    what = f"{height}×{width}, batch {options.batch}, {dtype}, {machine.gpu or 'CPU'}"

    curves: dict[str, Curve] = {}
    began = time.monotonic()
    for name, folder, head in ((OURS, "ours", nullcontext()), (FORMULA, "formula", written_out())):
        console.print(f"{name}: {what}, {config.data.workers} workers", soft_wrap=True)
        seconds = options.seconds
        if seconds is not None:
            seconds = seconds - (time.monotonic() - began) if curves else seconds / 2
        with head:
            curves[name] = run(config, work / folder, device, console, seconds)
        write(options.out, machine, what, curves)
        console.print(f"{name}: {curves[name]}", soft_wrap=True)
        if curves[name].status == STOPPED:
            console.print(f"Interrupted; {options.out} has what was reached.", soft_wrap=True)
            return INTERRUPTED
    both = min(curve.steps_done for curve in curves.values())
    if both:
        losses = ", ".join(f"{name} {curve.losses[both - 1]:.4f}" for name, curve in curves.items())
        console.print(f"loss at step {both}: {losses}")
    console.print(f"{options.out / PLOT_NAME} shows both.", soft_wrap=True)
    return 0 if all(curve.status in (OK, LATE) for curve in curves.values()) else FAILURE


if __name__ == "__main__":
    # A shell's background jobs ignore interrupts, which `timeout -s INT` has to reach nevertheless.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
