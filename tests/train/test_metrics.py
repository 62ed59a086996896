"""Every metric against a count in plain Python, streamed against at once, and its best constant."""

from __future__ import annotations

import math

import pytest
import torch
from test_losses import make_batch, pixels
from torch import Tensor

from degmix.metrics import BestF, DepthRMSE, MeanIoU, Metric, NormalsMeanError
from degmix.tasks import TASKS

THRESHOLDS = tuple(k / 20 for k in range(1, 20))
METRICS = {
    "semseg": lambda: MeanIoU(5),
    "depth": DepthRMSE,
    "normals": NormalsMeanError,
    "sal": lambda: BestF(0.3, THRESHOLDS),
}
every_metric = pytest.mark.parametrize("task", METRICS)


def make_case(task: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predictions of six pictures, and targets in which a class, or a direction, is more frequent."""
    logits, target = make_batch(task, seed, batch=6, height=5, width=7)
    if task == "semseg":
        frequent = (logits[:, 0] > 0) & (target != 255)
        return logits.argmax(1), torch.where(frequent, 1, target)
    if task == "sal":
        return logits.softmax(1)[:, 1], target
    if task == "normals":
        up = torch.tensor([0.2, 0.5, 0.8]).reshape(1, 3, 1, 1) * target.any(1, keepdim=True)
        return logits, torch.nn.functional.normalize(target + up, dim=1)
    return logits, target


def measured(metric: Metric, prediction: Tensor, target: Tensor) -> float:
    metric.update(prediction, target)
    return metric.compute()


def test_mean_iou_counts_every_class() -> None:
    prediction, target = make_case("semseg")
    pairs = [(p[0], g[0]) for p, g in pixels("semseg", prediction[:, None], target)]
    scores = []
    for c in range(6):  # class 5 never occurs and counts as zero
        union = sum(p == c or g == c for p, g in pairs)
        scores.append(sum(p == g == c for p, g in pairs) / union if union else 0.0)
    assert measured(MeanIoU(6), prediction, target) == pytest.approx(100 * sum(scores) / 6, rel=1e-12)


def test_depth_rmse_pools_pixels() -> None:
    prediction, target = make_case("depth")
    errors = [(p[0] - g[0]) ** 2 for p, g in pixels("depth", prediction, target)]
    expected = math.sqrt(sum(errors) / len(errors))
    assert measured(DepthRMSE(), prediction, target) == pytest.approx(expected, rel=1e-12)


def test_normals_error_is_the_mean_angle() -> None:
    prediction, target = make_case("normals")
    cosines = [
        sum(a * b for a, b in zip(p, g, strict=True)) / (math.hypot(*p) * math.hypot(*g))
        for p, g in pixels("normals", prediction, target)
    ]
    expected = sum(math.degrees(math.acos(cosine)) for cosine in cosines) / len(cosines)
    assert measured(NormalsMeanError(), prediction, target) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("degrees", [1e-6, 90.0, 180.0])
def test_normals_error_keeps_its_digits(degrees: float) -> None:
    target = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    angle = math.radians(degrees)
    prediction = torch.tensor([math.sin(angle), 0.0, math.cos(angle)], dtype=torch.float64)
    prediction = prediction.reshape(1, 3, 1, 1)
    assert measured(NormalsMeanError(), prediction, target) == pytest.approx(degrees, rel=1e-9)


@pytest.mark.parametrize("beta_squared", [0.3, 1.0])
def test_best_f_tries_every_threshold(beta_squared: float) -> None:
    prediction, target = make_case("sal")
    pairs = [(p[0], g[0]) for p, g in pixels("sal", prediction[:, None], target)]
    best = 0.0
    for threshold in torch.tensor(THRESHOLDS).tolist():
        true_positives = sum(p > threshold and g == 1 for p, g in pairs)
        if true_positives:
            precision = true_positives / sum(p > threshold for p, _ in pairs)
            recall = true_positives / sum(g for _, g in pairs)
            best = max(best, (1 + beta_squared) * precision * recall / (beta_squared * precision + recall))
    metric = BestF(beta_squared, THRESHOLDS)
    assert measured(metric, prediction, target) == pytest.approx(100 * best, rel=1e-12)


@every_metric
def test_streamed_equals_at_once(task: str) -> None:
    (prediction, target), whole, streamed = make_case(task), METRICS[task](), METRICS[task]()
    whole.update(prediction, target)
    for p, g in zip(prediction, target, strict=True):
        streamed.update(p[None], g[None])
    assert streamed.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert streamed.best_constant() == pytest.approx(whole.best_constant(), rel=1e-12)


@every_metric
def test_perfect_prediction(task: str) -> None:
    _, target = make_case(task)
    perfect = target.clamp(max=4) if task == "semseg" else target.clone()
    expected = 0.0 if task in ("depth", "normals") else 100.0
    assert measured(METRICS[task](), perfect, target) == pytest.approx(expected, abs=1e-5)


@every_metric
def test_no_constant_beats_the_best_constant(task: str) -> None:
    _, target = make_case(task, seed=3)
    generator = torch.Generator().manual_seed(1)
    metric = METRICS[task]()
    constants = {
        "semseg": list(range(5)),
        "depth": (torch.rand(50, generator=generator) * 8).tolist(),
        "normals": list(torch.randn(300, 3, 1, 1, generator=generator)),
        "sal": [0.0, 0.02, 0.3, 0.72, 1.0],
    }[task]
    values = []
    for constant in constants:
        if task == "normals":
            prediction = constant.expand_as(target)
        else:
            prediction = torch.full(target.shape, constant)
        values.append(measured(METRICS[task](), prediction, target))
    metric.update(prediction, target)
    best = metric.best_constant()
    if task in ("semseg", "sal"):
        assert best == pytest.approx(max(values), rel=1e-9)  # the candidates are all there is
    else:
        assert best <= min(values) + 1e-9
        # The bar is one that a constant can reach, not a bound below all of them.
        assert best > 0.9 * min(values)


def test_best_constant_normal_of_a_box_room_is_its_most_frequent_wall() -> None:
    walls = torch.tensor([[0.0, 0, 1]] * 6 + [[1.0, 0, 0]] * 2 + [[0, 1.0, 0]] * 2).T.reshape(1, 3, 2, 5)
    metric = NormalsMeanError()
    metric.update(walls, walls)
    assert metric.best_constant() == pytest.approx(0.4 * 90, rel=1e-9)


@every_metric
def test_without_labels_there_is_no_number(task: str) -> None:
    (prediction, target), metric = make_case(task), METRICS[task]()
    metric.update(prediction, torch.full_like(target, 0 if task in ("depth", "normals") else 255))
    assert math.isnan(metric.compute())
    assert math.isnan(metric.best_constant())


def test_every_task_measures_its_own_predictions() -> None:
    for name, task in TASKS.items():
        channels = task.channels or 5
        logits = torch.randn(1, channels, 4, 6)
        prediction = task.predict(logits)
        metric = task.metric(channels)
        target = (prediction > 0.5).float() if name in ("sal", "edge") else prediction
        metric.update(prediction, target)
        assert math.isfinite(metric.compute())
        assert math.isfinite(metric.best_constant())
