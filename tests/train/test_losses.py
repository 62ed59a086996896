"""Every loss against its formula written out pixel by pixel in float64, and what ignored pixels may do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from degmix import losses
from degmix.tasks import TASKS, task_channels

CHANNELS = task_channels(tuple(TASKS), classes=5)


def make_batch(
    task: str, seed: int = 0, batch: int = 2, height: int = 5, width: int = 4
) -> tuple[Tensor, Tensor]:
    """Float64 logits and a target with a fair share of ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, height, width)
    logits = torch.randn(batch, CHANNELS[task], height, width, generator=generator, dtype=torch.float64)
    ignored = torch.rand(shape, generator=generator) < 0.3
    if task in ("semseg", "human_parts", "sal"):
        target = torch.randint(CHANNELS[task], shape, generator=generator)
        target[ignored] = losses.IGNORE
    elif task == "depth":
        target = torch.rand(shape, generator=generator, dtype=torch.float64)[:, None] * 5 + 0.5
        target[ignored[:, None]] = 0
    elif task == "normals":
        target = torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)
        target = torch.nn.functional.normalize(target, dim=1) * ~ignored[:, None]
    else:
        target = (torch.rand(shape, generator=generator)[:, None] < 0.2).double()
        target[ignored[:, None]] = losses.IGNORE
    return logits, target


def pixels(task: str, logits: Tensor, target: Tensor) -> list[tuple[list[float], list[float]]]:
    """The valid pixels as plain numbers: (logits of the pixel, target of the pixel)."""
    flat_logits = logits.movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    flat_target = (target.movedim(1, -1) if target.dim() == 4 else target[..., None]).flatten(0, 2).tolist()
    ignored = {"depth": [0.0], "normals": [0.0, 0.0, 0.0]}.get(task, [255])
    return [(p, g) for p, g in zip(flat_logits, flat_target, strict=True) if g != ignored]


def negative_log_likelihood(p: list[float], label: int) -> float:
    return math.log(sum(math.exp(value) for value in p)) - p[label]


def expected_loss(task: str, logits: Tensor, target: Tensor) -> float:
    valid = pixels(task, logits, target)
    if task in ("semseg", "human_parts"):
        terms = [negative_log_likelihood(p, int(g[0])) for p, g in valid]
    elif task == "sal":
        positives = sum(int(g[0]) for _, g in valid)
        weight = {0: positives / len(valid), 1: 1 - positives / len(valid)}
        terms = [weight[int(g[0])] * negative_log_likelihood(p, int(g[0])) for p, g in valid]
    elif task == "depth":
        terms = [abs(p[0] - g[0]) for p, g in valid]
    elif task == "normals":
        terms = [sum(abs(a / math.hypot(*p) - b) for a, b in zip(p, g, strict=True)) for p, g in valid]
    else:
        likelihoods = [(1 / (1 + math.exp(-p[0])), g[0]) for p, g in valid]
        terms = [-0.8 * math.log(q) if g == 1 else -0.2 * math.log(1 - q) for q, g in likelihoods]
    return sum(terms) / len(valid)


@pytest.mark.parametrize("task", TASKS)
def test_loss_equals_its_formula(task: str) -> None:
    logits, target = make_batch(task)
    expected = pytest.approx(expected_loss(task, logits, target), rel=1e-10)
    assert TASKS[task].loss(logits, target).item() == expected


@pytest.mark.parametrize("task", TASKS)
def test_gradient_equals_finite_differences(task: str) -> None:
    logits, target = make_batch(task, batch=1, height=3, width=2)
    assert torch.autograd.gradcheck(lambda x: TASKS[task].loss(x, target), logits.requires_grad_())


@pytest.mark.parametrize("task", TASKS)
def test_ignored_pixels_do_not_count(task: str) -> None:
    logits, target = make_batch(task)
    logits.requires_grad_()
    loss = TASKS[task].loss(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    valid = losses.valid_normals(target) if task == "normals" else target != (0 if task == "depth" else 255)
    ignored = ~valid.reshape(gradient.shape[0], 1, *gradient.shape[2:]).expand_as(gradient)
    assert ignored.any()
    assert (gradient[ignored] == 0).all()
    assert (gradient[~ignored] != 0).all()
    wild = torch.where(ignored, 1e3, logits)
    assert TASKS[task].loss(wild, target).item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_without_valid_pixels_loss_and_gradient_are_zero(task: str) -> None:
    logits, target = make_batch(task)
    logits.requires_grad_()
    target = torch.full_like(target, 0 if task in ("depth", "normals") else losses.IGNORE)
    loss = TASKS[task].loss(logits, target)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("task", TASKS)
def test_half_precision_logits_are_summed_in_float32(task: str) -> None:
    logits, target = make_batch(task, height=40, width=40)
    half = logits.bfloat16()
    target = target.float() if target.is_floating_point() else target
    loss = TASKS[task].loss(half, target)
    assert loss.dtype == torch.float32
    target = target.double() if target.is_floating_point() else target
    assert loss.item() == pytest.approx(TASKS[task].loss(half.double(), target).item(), rel=1e-5)


def test_one_class_alone_weighs_nothing_in_the_balanced_loss() -> None:
    logits, _ = make_batch("sal")
    assert losses.balanced_cross_entropy_loss(logits, torch.zeros(2, 5, 4, dtype=torch.int64)).item() == 0


def test_normals_loss_survives_a_zero_prediction() -> None:
    _, target = make_batch("normals")
    logits = torch.zeros_like(target, requires_grad=True)
    losses.normals_loss(logits, target).backward()
    assert logits.grad.abs().max() <= 1


def test_edge_weights_are_a_choice() -> None:
    logits, target = make_batch("edge")
    all_edges = torch.where(target == 0, 255, target)
    half, most = (losses.edge_loss(logits, all_edges, w).item() for w in (0.5, 0.95))
    assert most == pytest.approx(half * 0.95 / 0.5, rel=1e-12)
