"""The demo: from nothing to a trained small DeGMix and a picture of its predictions, in minutes on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from degmix import build, checkpoint, train
from degmix.config import ConfigError, load_config
from degmix.data import synthetic
from degmix.data.nyud import NYUD
from degmix.data.transforms import normalize
from degmix.evaluate import METRICS_NAME, Result, evaluate, results_table, write_metrics
from degmix.files import atomic_file
from degmix.losses import IGNORE
from degmix.predict import predict
from degmix.progress import stage
from degmix.tasks import Labels
from degmix.visualize import prediction_sheet

DATA_NAME = "data"
PICTURE_NAME = "predictions.png"
SCENES = 160
VAL_FRACTION = 1 / 8
EXAMPLES = 4
NAMES = {
    DATA_NAME,
    PICTURE_NAME,
    METRICS_NAME,
    train.CONFIG_NAME,
    train.LOG_NAME,
    checkpoint.CHECKPOINT_NAME,
    checkpoint.MODEL_NAME,
}
"""What a demo leaves."""


def run(
    out: Path, overrides: Sequence[str], scenes: int, device: torch.device, console: Console
) -> dict[str, Result]:
    """Render, train, evaluate and draw; everything is left in ``out``.

    Args:
        out: the run folder; an earlier demo's files in it are replaced.
        overrides: changes of the preset "demo".
        scenes: rooms to render.
        device: where to train.
        console: where to show progress and the results.

    Raises:
        TrainingError: if ``out`` holds something other than an earlier demo.
    """
    config = load_config("demo", overrides).with_data_root(out / DATA_NAME)
    build.build_model(config)  # a mistake in the configuration shows before anything is written
    _expect_own(out)
    if config.data.classes != "synthetic" or any(change.startswith("data.root=") for change in overrides):
        raise ConfigError(
            "data.root, data.classes: the demo renders its own rooms; see degmix train --config demo"
        )
    # Rendered beside the folder, so that an earlier demo's files stay until there is something new.
    rendered = out.with_name(f".{out.name}.rooms")
    shutil.rmtree(rendered, ignore_errors=True)
    with stage(console, "rendering", scenes) as advance:
        synthetic.write(
            rendered,
            count=scenes,
            size=config.data.size,
            seed=config.train.seed,
            val_fraction=VAL_FRACTION,
            progress=lambda done, _: advance(done, ""),
        )
    _make_room(out)
    train.write_config(out, config)  # first, as it marks the folder as a demo's
    rendered.rename(out / DATA_NAME)
    train.start(config, out, device, console)

    model, config = checkpoint.load_model(out / checkpoint.MODEL_NAME)
    model.to(device)
    dataset = build.open_split(config, "val")
    results = evaluate(model, dataset, build.channels(config), console)
    write_metrics(out / METRICS_NAME, results)
    draw_examples(out / PICTURE_NAME, model, dataset, build.labels(config))
    console.print(
        results_table(results, f"DeGMix after {config.train.steps} steps, on rooms it has not seen")
    )
    console.print(f"{out / PICTURE_NAME} shows its predictions.", soft_wrap=True)
    return results


def draw_examples(path: Path, model: torch.nn.Module, dataset: NYUD, labels: Labels) -> None:
    """Write the sheet of image, ground truth and prediction for samples spread over the data set."""
    samples = list(dataset)
    # Rooms without people have no label for their parts; they are shown only if there are no others.
    peopled = [
        sample for sample in samples if "human_parts" in sample and sample["human_parts"].min() < IGNORE
    ]
    samples = peopled or samples
    chosen = [samples[i] for i in np.linspace(0, len(samples) - 1, EXAMPLES).round().astype(int)]
    predictions = [predict(model, normalize(sample["image"])) for sample in chosen]
    sheet = prediction_sheet(
        [(sample["image"] * 255).round().byte().movedim(0, -1).numpy() for sample in chosen],
        [{task: sample[task].numpy() for task in predictions[0]} for sample in chosen],
        predictions,
        labels,
    )
    with atomic_file(path) as file:
        sheet.save(file, "PNG")


def _expect_own(out: Path) -> None:
    """Refuse a folder with anything in it but an earlier demo's files."""
    present = (
        {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.exists() else set()
    )
    if present and (train.CONFIG_NAME not in present or present - NAMES):
        other = ", ".join(sorted(present - NAMES)) or "no " + train.CONFIG_NAME
        raise train.TrainingError(f"{out}: expected a new folder or an earlier demo's, found {other}")


def _make_room(out: Path) -> None:
    """Make ``out`` a folder without an earlier demo's files."""
    out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
