"""Streaming metrics: ``update`` with one batch after another, ``compute`` over all pixels seen.

Sums are kept in float64 or int64, so a metric does not depend on how the pixels were divided into batches
beyond the last bits. Every metric also knows ``best_constant()``: the best value that any constant prediction
reaches on the same targets, the bar a trained model has to clear. It comes from the same formula as
``compute`` and from statistics of the targets gathered on the way. Without a valid pixel both are NaN.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from degmix.losses import IGNORE, valid_normals


class Metric(Protocol):
    """What every metric offers."""

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch; the shapes stand at each metric."""

    def compute(self) -> float:
        """The metric over everything added so far."""

    def best_constant(self) -> float:
        """The metric of the best constant prediction for the same targets."""


class MeanIoU:
    """Mean intersection over union in percent, over all classes; a class that never occurs counts as zero.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)  # (true class, predicted class)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add predicted classes (B, H, W) int64 and true ones (B, H, W) int64, 255 ignored."""
        valid = target != IGNORE
        pairs = target[valid] * self.classes + prediction[valid]
        counts = torch.bincount(pairs, minlength=self.classes**2)
        self.confusion += counts.reshape(self.classes, self.classes).cpu()

    def compute(self) -> float:
        return _mean_iou(self.confusion.double())

    def best_constant(self) -> float:
        """The best of "class c everywhere"."""
        true = self.confusion.sum(dim=1).double()
        candidates = torch.zeros(self.classes, self.classes, self.classes, dtype=torch.float64)
        for c in range(self.classes):
            candidates[c, :, c] = true
        return max(_mean_iou(confusion) for confusion in candidates)


def _mean_iou(confusion: Tensor) -> float:
    if not confusion.sum():
        return math.nan
    intersection = confusion.diagonal()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - intersection
    return 100 * (intersection / union.clamp(min=1)).mean().item()


class DepthRMSE:
    """Root of the mean squared error in metres over all valid pixels pooled."""

    def __init__(self) -> None:
        self.count = 0
        self.squared_error = 0.0
        # Welford's running mean and squared deviation of the targets: a difference of two large sums would
        # lose the digits of a small variance.
        self.mean = 0.0
        self.squared_deviation = 0.0

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add predicted and true depth, both (B, 1, H, W); true depth 0 is ignored."""
        valid = target > 0
        true = target[valid].double()
        if not true.numel():
            return
        self.squared_error += (prediction[valid].double() - true).square().sum().item()
        count, mean = true.numel(), true.mean().item()
        total = self.count + count
        self.squared_deviation += (true - mean).square().sum().item()
        self.squared_deviation += (mean - self.mean) ** 2 * self.count * count / total
        self.mean += (mean - self.mean) * count / total
        self.count = total

    def compute(self) -> float:
        return math.sqrt(self.squared_error / self.count) if self.count else math.nan

    def best_constant(self) -> float:
        """The mean of the valid depths everywhere."""
        return math.sqrt(self.squared_deviation / self.count) if self.count else math.nan


class NormalsMeanError:
    """Mean angle in degrees, ``2·atan2(|p − g|, |p + g|)``, over all valid pixels pooled."""

    GRID = 256
    """True directions are counted in cells of this inverse width (0.2°) for ``best_constant``."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.cells = np.zeros(0, dtype=np.int64)
        self.cell_counts = np.zeros(0, dtype=np.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add directions (B, 3, H, W) of any length; a true direction (0, 0, 0) is ignored."""
        valid = valid_normals(target)[:, 0]
        true = _normalized(target.movedim(1, -1)[valid].double())
        predicted = _normalized(prediction.movedim(1, -1)[valid].double())
        self.total += _angles(predicted, true).sum().item()
        self.count += true.shape[0]
        grid = (true * self.GRID).round().long() + self.GRID  # each component 0 … 2·GRID
        width = 2 * self.GRID + 1
        cells = ((grid[:, 0] * width + grid[:, 1]) * width + grid[:, 2]).cpu().numpy()
        new, new_counts = np.unique(cells, return_counts=True)
        self.cells, place = np.unique(np.concatenate((self.cells, new)), return_inverse=True)
        counts = np.bincount(place, weights=np.concatenate((self.cell_counts, new_counts)))
        self.cell_counts = counts.astype(np.int64)

    def compute(self) -> float:
        return self.total / self.count if self.count else math.nan

    def best_constant(self) -> float:
        """The best single direction, found by a search over the histogram of the true ones."""
        if not self.count:
            return math.nan
        width = 2 * self.GRID + 1
        components = np.stack(
            (self.cells // width**2, self.cells // width % width, self.cells % width), axis=1
        )
        directions = _normalized(torch.from_numpy(components - self.GRID).double())
        weights = torch.from_numpy(self.cell_counts / self.count)
        most_frequent = directions[weights.topk(min(16, len(weights))).indices]
        mean = _normalized((directions * weights[:, None]).sum(dim=0, keepdim=True))
        axes = torch.cat((torch.eye(3), -torch.eye(3))).double()
        starts = sorted(
            torch.cat((most_frequent, mean, axes)),
            key=lambda start: _mean_angle(start, directions, weights),
        )
        return min(_descend(start, directions, weights) for start in starts[:2])


def _mean_angle(direction: Tensor, directions: Tensor, weights: Tensor) -> float:
    return (_angles(direction.expand_as(directions), directions) * weights).sum().item()


def _descend(start: Tensor, directions: Tensor, weights: Tensor) -> float:
    """Smallest weighted mean angle to ``directions`` (n, 3) that a pattern search from ``start`` finds."""
    best, value, step = start, _mean_angle(start, directions, weights), 0.5
    while step > 1e-4:
        trials = [
            _normalized(best + step * move) for move in torch.cat((torch.eye(3), -torch.eye(3))).double()
        ]
        values = [_mean_angle(trial, directions, weights) for trial in trials]
        if min(values) < value:
            value = min(values)
            best = trials[values.index(value)]
        else:
            step /= 2
    return value


def _angles(p: Tensor, g: Tensor) -> Tensor:
    """Degrees between unit vectors (n, 3); unlike acos it keeps its digits near 0° and 180°."""
    difference = torch.linalg.vector_norm(p - g, dim=-1)
    return torch.rad2deg(2 * torch.atan2(difference, torch.linalg.vector_norm(p + g, dim=-1)))


def _normalized(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


class BestF:
    """The best F-measure in percent over thresholds on a probability, counts pooled over all pixels.

    Args:
        beta_squared: weight of recall against precision, ``F = (1 + β²)·P·R / (β²·P + R)``.
        thresholds: a pixel is predicted positive when its probability exceeds the threshold.
    """

    def __init__(self, beta_squared: float, thresholds: tuple[float, ...]) -> None:
        self.beta_squared = beta_squared
        self.thresholds = torch.tensor(thresholds)
        # How many pixels exceed exactly k thresholds: (negative | positive, k).
        self.counts = torch.zeros(2, len(thresholds) + 1, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add probabilities and labels (1, 0, or 255 ignored) of the same shape."""
        valid = target != IGNORE
        exceeded = torch.bucketize(prediction[valid].float(), self.thresholds.to(prediction.device))
        bins = self.counts.shape[1]
        pairs = (target[valid] > 0.5).long() * bins + exceeded
        self.counts += torch.bincount(pairs, minlength=2 * bins).reshape(2, bins).cpu()

    def compute(self) -> float:
        # Pixels above threshold k are those that exceed at least k + 1 of them.
        above = self.counts.flip(1).cumsum(1).flip(1)[:, 1:].double()
        return self._best(above[1], above[0])

    def best_constant(self) -> float:
        """Everything positive: any other constant finds nothing."""
        negatives, positives = self.counts.sum(dim=1, keepdim=True).double()
        return self._best(positives, negatives)

    def _best(self, true_positives: Tensor, false_positives: Tensor) -> float:
        """F from counts per threshold (k,)."""
        if not self.counts.sum():
            return math.nan
        # With P = tp / (tp + fp) and R = tp / positives, F needs no division by either.
        positives = self.counts[1].sum()
        denominator = self.beta_squared * positives + true_positives + false_positives
        return 100 * ((1 + self.beta_squared) * true_positives / denominator.clamp(min=1e-12)).max().item()
