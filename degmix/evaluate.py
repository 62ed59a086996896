"""Evaluation: every metric over a split at its images' own sizes, beside the best constant prediction."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from degmix.data.nyud import NYUD
from degmix.data.transforms import evaluation_transform
from degmix.files import atomic_file
from degmix.progress import stage
from degmix.tasks import TASKS, predictions_of

METRICS_NAME = "metrics.json"


@dataclass(frozen=True)
class Result:
    """One task's metric.

    Attributes:
        metric: its name.
        value: the model's.
        best_constant: of the best constant prediction on the same labels.
        unit: of both.
        lower_is_better: which direction is good.
    """

    metric: str
    value: float
    best_constant: float
    unit: str
    lower_is_better: bool

    @property
    def beats_constant(self) -> bool:
        """Whether the model is better than any constant."""
        return self.value < self.best_constant if self.lower_is_better else self.value > self.best_constant


@torch.inference_mode()
def evaluate(
    model: nn.Module, dataset: NYUD, tasks: Mapping[str, int], console: Console
) -> dict[str, Result]:
    """Run a model over a data set one image at a time, at the images' own sizes, and measure every task.

    Args:
        model: in eval mode; its device is used.
        dataset: images with the targets of every task.
        tasks: channels per task.
        console: where to show progress.

    Raises:
        PredictionError: if a prediction is not finite.
    """
    device = next(model.parameters()).device
    metrics = {name: TASKS[name].metric(channels) for name, channels in tasks.items()}
    with stage(console, "evaluating", len(dataset)) as advance:
        for index in range(len(dataset)):
            sample = evaluation_transform(dataset[index])
            predicted = predictions_of(model(sample["image"][None].to(device)))
            for name, metric in metrics.items():
                metric.update(predicted[name], sample[name][None].to(device))
            advance(index + 1, sample["name"])
    return {
        name: Result(
            TASKS[name].metric_name,
            metric.compute(),
            metric.best_constant(),
            TASKS[name].unit,
            TASKS[name].lower_is_better,
        )
        for name, metric in metrics.items()
    }


def write_metrics(path: Path, results: Mapping[str, Result]) -> None:
    """Write results as JSON; a metric without any labelled pixel is null."""
    tree = {
        name: {key: None if value != value else value for key, value in asdict(result).items()}
        for name, result in results.items()
    }
    with atomic_file(path) as file:
        file.write((json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode())


def results_table(results: Mapping[str, Result], title: str) -> Table:
    """A table for the terminal: task, metric, value, best constant."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("DeGMix", justify="right")
    table.add_column("best constant", justify="right")
    for name, result in results.items():
        colour = "green" if result.beats_constant else "red"
        table.add_row(
            TASKS[name].title,
            f"{result.metric} {'↓' if result.lower_is_better else '↑'}",
            Text(_number(result.value, result.unit), style=colour),
            _number(result.best_constant, result.unit),
        )
    return table


def _number(value: float, unit: str) -> str:
    if math.isnan(value):
        return "no labels"
    return f"{value:.3f} {unit}" if unit == "m" else f"{value:.2f} {unit}"
