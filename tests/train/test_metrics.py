"""Every metric against a count in plain Python, streamed against at once, and its best constant."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from degmix.metrics import BestF, DepthRMSE, MeanIoU, Metric, NormalsMeanError
from degmix.tasks import TASKS

THRESHOLDS = tuple(k / 20 for k in range(1, 20))


def random_classes(seed: int = 0, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (6, 5, 7), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.5] = 1
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    return torch.randint(classes, (6, 5, 7), generator=generator), target


def random_depth(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(6, 1, 5, 7, generator=generator) * 8
    target[torch.rand(target.shape, generator=generator) < 0.2] = 0
    return torch.rand(6, 1, 5, 7, generator=generator) * 8, target


def random_normals(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(6, 3, 5, 7, generator=generator) + torch.tensor([0.2, 0.5, 0.8]).reshape(1, 3, 1, 1)
    target = torch.nn.functional.normalize(target, dim=1)
    target = target * (torch.rand(6, 1, 5, 7, generator=generator) > 0.2)
    return torch.randn(6, 3, 5, 7, generator=generator), target


def random_binary(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(6, 5, 7, generator=generator) < 0.3).long()
    prediction = (torch.rand(6, 5, 7, generator=generator) + 0.3 * target) / 1.3
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    return prediction, target


CASES = {
    "mIoU": (lambda: MeanIoU(4), random_classes),
    "RMSE": (DepthRMSE, random_depth),
    "mErr": (NormalsMeanError, random_normals),
    "F": (lambda: BestF(0.3, THRESHOLDS), random_binary),
}


def measured(metric: Metric, prediction: Tensor, target: Tensor) -> float:
    metric.update(prediction, target)
    return metric.compute()


def test_mean_iou_counts_every_class() -> None:
    prediction, target = random_classes()
    pairs = [
        (p, g)
        for p, g in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True)
        if g != 255
    ]
    scores = []
    for c in range(5):  # class 4 never occurs and counts as zero
        union = sum(p == c or g == c for p, g in pairs)
        scores.append(sum(p == g == c for p, g in pairs) / union if union else 0.0)
    assert measured(MeanIoU(5), prediction, target) == pytest.approx(100 * sum(scores) / 5, rel=1e-12)


def test_depth_rmse_pools_pixels() -> None:
    prediction, target = random_depth()
    errors = [
        (p - g) ** 2
        for p, g in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True)
        if g
    ]
    assert measured(DepthRMSE(), prediction, target) == pytest.approx(
        math.sqrt(sum(errors) / len(errors)), rel=1e-12
    )


def test_normals_error_is_the_mean_angle() -> None:
    prediction, target = random_normals()
    pairs = zip(
        prediction.movedim(1, -1).reshape(-1, 3).tolist(),
        target.movedim(1, -1).reshape(-1, 3).tolist(),
        strict=True,
    )
    angles = [
        math.degrees(
            math.acos(sum(a * b for a, b in zip(p, g, strict=True)) / (math.hypot(*p) * math.hypot(*g)))
        )
        for p, g in pairs
        if any(g)
    ]
    assert measured(NormalsMeanError(), prediction, target) == pytest.approx(
        sum(angles) / len(angles), rel=1e-9
    )


@pytest.mark.parametrize("degrees", [1e-6, 90.0, 180.0])
def test_normals_error_keeps_its_digits(degrees: float) -> None:
    target = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    angle = math.radians(degrees)
    prediction = torch.tensor([math.sin(angle), 0.0, math.cos(angle)], dtype=torch.float64).reshape(
        1, 3, 1, 1
    )
    assert measured(NormalsMeanError(), prediction, target) == pytest.approx(degrees, rel=1e-9)


@pytest.mark.parametrize("beta_squared", [0.3, 1.0])
def test_best_f_tries_every_threshold(beta_squared: float) -> None:
    prediction, target = random_binary()
    pairs = [
        (p, g)
        for p, g in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True)
        if g != 255
    ]
    best = 0.0
    for threshold in torch.tensor(THRESHOLDS).tolist():
        true_positives = sum(p > threshold and g == 1 for p, g in pairs)
        if true_positives:
            precision = true_positives / sum(p > threshold for p, _ in pairs)
            recall = true_positives / sum(g for _, g in pairs)
            best = max(best, (1 + beta_squared) * precision * recall / (beta_squared * precision + recall))
    assert measured(BestF(beta_squared, THRESHOLDS), prediction, target) == pytest.approx(
        100 * best, rel=1e-12
    )


@pytest.mark.parametrize("name", CASES)
def test_streamed_equals_at_once(name: str) -> None:
    make_metric, make_data = CASES[name]
    prediction, target = make_data()
    whole, streamed = make_metric(), make_metric()
    whole.update(prediction, target)
    for p, g in zip(prediction, target, strict=True):
        streamed.update(p[None], g[None])
    assert streamed.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert streamed.best_constant() == pytest.approx(whole.best_constant(), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_perfect_prediction(name: str) -> None:
    make_metric, make_data = CASES[name]
    _, target = make_data()
    perfect = target.clone() if name != "mIoU" else target.clamp(max=3)
    assert measured(make_metric(), perfect, target) == pytest.approx(
        0.0 if name in ("RMSE", "mErr") else 100.0, abs=1e-5
    )


@pytest.mark.parametrize("name", CASES)
def test_no_constant_beats_the_best_constant(name: str) -> None:
    make_metric, make_data = CASES[name]
    _, target = make_data(seed=3)
    generator = torch.Generator().manual_seed(1)
    metric = make_metric()
    constants = {
        "mIoU": list(range(4)),
        "RMSE": (torch.rand(50, generator=generator) * 8).tolist(),
        "mErr": list(torch.randn(300, 3, 1, 1, generator=generator)),
        "F": [0.0, 0.02, 0.3, 0.72, 1.0],
    }[name]
    values = []
    for constant in constants:
        if name == "mErr":
            prediction = constant.expand_as(target)
        else:
            prediction = torch.full(target.shape, constant)
        values.append(measured(make_metric(), prediction, target))
    metric.update(prediction, target)
    best = metric.best_constant()
    if name in ("mIoU", "F"):
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


@pytest.mark.parametrize("name", CASES)
def test_without_labels_there_is_no_number(name: str) -> None:
    make_metric, make_data = CASES[name]
    prediction, target = make_data()
    metric = make_metric()
    metric.update(prediction, torch.full_like(target, 0 if name in ("RMSE", "mErr") else 255))
    assert math.isnan(metric.compute())
    assert math.isnan(metric.best_constant())


def test_every_task_measures_its_own_predictions() -> None:
    for name, task in TASKS.items():
        channels = task.channels or 5
        logits = torch.randn(1, channels, 4, 6)
        prediction = task.predict(logits)
        metric = task.metric(channels)
        target = (
            prediction
            if name in ("semseg", "human_parts", "depth", "normals")
            else (prediction > 0.5).float()
        )
        metric.update(prediction, target)
        assert math.isfinite(metric.compute())
        assert math.isfinite(metric.best_constant())
