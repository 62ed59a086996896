"""The six tasks: everything that differs between them, in one table.

The model, training, evaluation and pictures treat every task alike and look up here what its channels, loss,
metric and colours are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from degmix import losses, metrics


@dataclass(frozen=True)
class Task:
    """One dense-prediction task.

    Attributes:
        title: what people read.
        channels: channels of the logits, or None for "as many as the data set has classes".
        loss: (logits, target) -> scalar.
        weight: the loss's weight in the sum over tasks.
        predict: logits (B, channels, H, W) -> prediction in the target's terms: class indices (B, H, W),
            probability of the positive class (B, H, W) for sal and (B, 1, H, W) for edge, metres
            (B, 1, H, W) or unit vectors (B, 3, H, W).
        metric: makes the metric for a number of channels; it takes predictions, not logits.
        metric_name, unit, lower_is_better: how the metric's value reads.
        picture: how predictions are drawn.
    """

    title: str
    channels: int | None
    loss: Callable[[Tensor, Tensor], Tensor]
    weight: float
    predict: Callable[[Tensor], Tensor]
    metric: Callable[[int], metrics.Metric]
    metric_name: str
    unit: str
    lower_is_better: bool
    picture: Literal["classes", "parts", "probability", "depth", "normals"]


def _most_likely_class(logits: Tensor) -> Tensor:
    return logits.argmax(dim=1)


def _salient_probability(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)[:, 1]


def _as_predicted(logits: Tensor) -> Tensor:
    return logits


def _saliency_metric(channels: int) -> metrics.Metric:
    return metrics.BestF(beta_squared=0.3, thresholds=tuple(k / 20 for k in range(1, 20)))


def _edge_metric(channels: int) -> metrics.Metric:
    return metrics.BestF(beta_squared=1.0, thresholds=tuple(k / 100 for k in range(1, 100)))


TASKS: dict[str, Task] = {
    "semseg": Task(
        title="Semantic segmentation",
        channels=None,
        loss=losses.cross_entropy_loss,
        weight=1.0,
        predict=_most_likely_class,
        metric=metrics.MeanIoU,
        metric_name="mIoU",
        unit="%",
        lower_is_better=False,
        picture="classes",
    ),
    "human_parts": Task(
        title="Human parts",
        channels=7,
        loss=losses.cross_entropy_loss,
        weight=2.0,
        predict=_most_likely_class,
        metric=metrics.MeanIoU,
        metric_name="mIoU",
        unit="%",
        lower_is_better=False,
        picture="parts",
    ),
    "sal": Task(
        title="Saliency",
        channels=2,
        loss=losses.balanced_cross_entropy_loss,
        weight=5.0,
        predict=_salient_probability,
        metric=_saliency_metric,
        metric_name="maxF",
        unit="%",
        lower_is_better=False,
        picture="probability",
    ),
    "depth": Task(
        title="Depth",
        channels=1,
        loss=losses.depth_loss,
        weight=1.0,
        predict=_as_predicted,
        metric=lambda channels: metrics.DepthRMSE(),
        metric_name="RMSE",
        unit="m",
        lower_is_better=True,
        picture="depth",
    ),
    "normals": Task(
        title="Surface normals",
        channels=3,
        loss=losses.normals_loss,
        weight=10.0,
        predict=losses.unit_vectors,
        metric=lambda channels: metrics.NormalsMeanError(),
        metric_name="mErr",
        unit="°",
        lower_is_better=True,
        picture="normals",
    ),
    # Pixel-wise F, not the boundary benchmark's odsF: it matches no pixels within a distance.
    "edge": Task(
        title="Edges",
        channels=1,
        loss=losses.edge_loss,
        weight=50.0,
        predict=torch.sigmoid,
        metric=_edge_metric,
        metric_name="pixelF",
        unit="%",
        lower_is_better=False,
        picture="probability",
    ),
}


@dataclass(frozen=True)
class Labels:
    """Names for the legends: of the semantic classes and of the human parts (background first)."""

    classes: Sequence[str]
    parts: Sequence[str]


def task_channels(tasks: Sequence[str], classes: int) -> dict[str, int]:
    """Channels per task, as ``DeGMix(tasks=...)`` takes them.

    Args:
        tasks: names out of :data:`TASKS`.
        classes: the data set's number of semantic classes.
    """
    return {name: classes if TASKS[name].channels is None else TASKS[name].channels for name in tasks}


class PredictionError(ValueError):
    """Logits that nothing can be made of; the message is one sentence."""


def predictions_of(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every task's prediction, as its ``predict`` makes it of its logits.

    Raises:
        PredictionError: if not all logits of a task are finite.
    """
    for name, value in logits.items():
        if not value.isfinite().all():
            raise PredictionError(
                f"{name}: the model predicts values that are not finite: its weights are damaged or diverged"
            )
    return {name: TASKS[name].predict(value.float()) for name, value in logits.items()}
