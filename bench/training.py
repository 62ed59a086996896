"""Training for real: the demo's model on synthetic rooms, with the kernels and with the plain formula.

    python -m bench.training --out runs/training       # at NYUD-v2's size in bf16; meant for a GPU
    python -m bench.training --quick                    # seconds on a CPU, in fp32, without kernels

Both runs see the same pictures in the same order from the same seed. Leaves training.json (curves, pictures
per second, machine), training.png and both run folders. Needs what ``pip install '.[test]'`` installs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console

from bench.deform_conv import load_torchvision
from bench.machine import read_machine
from degmix import DeGMixHead, train
from degmix.config import Config, load_config
from degmix.data import synthetic
from degmix.model.formula import formula

KERNELS, FORMULA = "ours", "eager formula"


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
    """The demo's, at the size and length asked for."""
    height, width = options.size
    return load_config(
        "demo",
        [
            f"data.root={rooms}",
            f"data.size=[{height}, {width}]",
            f"data.workers={options.workers}",
            f"train.steps={options.steps}",
            f"train.batch_size={options.batch}",
            f"train.amp={str(torch.cuda.is_available()).lower()}",
            f"train.log_every={max(options.steps // 100, 1)}",
        ],
    )


def curve(run: Path, batch: int) -> dict[str, object]:
    """A run's losses by step, and its pictures per second in the second half, when all is compiled."""
    records = [json.loads(line) for line in (run / train.LOG_NAME).read_text().splitlines()]
    middle, last = records[len(records) // 2 - 1], records[-1]
    # The log's rate is that since the start.
    middle_seconds, seconds = (each["step"] * batch / each["images_per_second"] for each in (middle, last))
    rate = (last["step"] - middle["step"]) * batch / (seconds - middle_seconds)
    return {
        "steps": [record["step"] for record in records],
        "losses": [record["loss"] for record in records],
        "images_per_second": rate,
    }


def draw(curves: dict[str, dict], title: str, path: Path) -> None:
    """Both loss curves on one plot."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss, all tasks together")
    for name, each in curves.items():
        label = f"{name}: {each['images_per_second']:.3g} images/s"
        axes.plot(each["steps"], each["losses"], label=label, alpha=0.8)
    axes.legend()
    figure.savefig(path, dpi=150)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser("python -m bench.training", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/training"), help="a new folder (default: runs/training)")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=(425, 560), help="of the pictures")
    add("--rooms", type=int, default=160, help="rooms to render (default: 160)")
    add("--steps", type=int, default=450, help="steps of each run, at least 2 (default: 450)")
    add("--batch", type=int, default=8, help="pictures in a step (default: 8)")
    add("--workers", type=int, default=8, help="processes that read pictures (default: 8)")
    add("--quick", action="store_true", help="a few steps with small pictures: shows that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.rooms, options.steps, options.batch, options.workers = (48, 64), 8, 8, 2, 0
    if options.steps < 2:
        parser.error("--steps: expected at least 2")
    if options.out.exists():
        parser.error(f"--out {options.out}: exists already")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train twice, and put the curves together."""
    options, console = parse(arguments), Console()
    device = train.default_device()
    load_torchvision(device)  # without it the formula would be something else than people have today
    if device.type != "cuda":
        console.print("No GPU: fp32, and our ops run their references; this says nothing about the kernels.")
    options.out.mkdir(parents=True)
    rooms = options.out / "rooms"
    synthetic.write(rooms, options.rooms, tuple(options.size), seed=0)
    config = configuration(options, rooms)
    train.start(config, options.out / "ours", device, console)
    with written_out():
        train.start(config, options.out / "formula", device, console)
    folders = {KERNELS: options.out / "ours", FORMULA: options.out / "formula"}
    curves = {name: curve(folder, options.batch) for name, folder in folders.items()}
    machine = read_machine(device)
    height, width = options.size
    dtype = "bf16" if device.type == "cuda" else "fp32"
    title = f"{height}×{width}, batch {options.batch}, {dtype}, {machine.gpu or 'CPU'}"
    record = {"machine": asdict(machine), "what": title, "curves": curves}
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(curves, title, options.out / "training.png")
    for name, each in curves.items():
        console.print(f"{name}: {each['images_per_second']:.3g} images/s, last loss {each['losses'][-1]:.4f}")
    console.print(f"{options.out / 'training.png'} shows both.", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
