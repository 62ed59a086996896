"""The training recipe of the paper (optimiser, accumulation, clipping, loss weights), in the real loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quick_run import quick_config
from rich.console import Console
from torch import Tensor

from degmix import build, train
from degmix.config import Config, LossConfig, TrainConfig, load_config
from degmix.tasks import TASKS

CPU = torch.device("cpu")


def gradients_of_first_step(config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the loop hands to the optimiser in its first step."""
    seen: list[list[Tensor]] = []
    original = torch.optim.SGD.step

    def step(self, *arguments):
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        seen.append([each.grad.clone() for each in parameters if each.grad is not None])
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        train.start(config, out, CPU, Console(quiet=True))
    return seen[0]


def test_the_papers_numbers():
    weights = {name: task.weight for name, task in TASKS.items()}
    assert weights == {"semseg": 1, "human_parts": 2, "sal": 5, "depth": 1, "normals": 10, "edge": 50}
    assert LossConfig().edge_positive == 0.8
    for recipe in (TrainConfig(), load_config("nyud_swin_t").train):
        assert (recipe.steps, recipe.batch_size, recipe.lr) == (40_000, 8, 1e-3)
        assert (recipe.momentum, recipe.weight_decay, recipe.power) == (0.9, 5e-4, 0.9)


def test_the_optimiser_is_the_configured_one(rooms: Path):
    config = quick_config(rooms, "train.lr=0.03", "train.momentum=0.7", "train.weight_decay=0.002")
    (group,) = build.build_optimizer(config, build.build_model(config)).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.03, 0.7, 0.002)


def test_accumulated_gradients_are_the_mean_of_their_batches(
    rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = quick_config(rooms, "train.steps=1", "train.accumulate=2", "train.clip=null")
    found = gradients_of_first_step(config, tmp_path / "run", monkeypatch)

    torch.manual_seed(config.train.seed)
    model = build.build_model(config).train()
    losses_of = build.build_losses(config)
    for batch in train._batches(config, 0):
        logits = model(batch["image"])
        (sum(losses_of[task](logits[task], batch[task]) for task in config.tasks) / 2).backward()
    expected = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_gradient(rooms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = quick_config(rooms, "train.steps=1", "train.clip=0.01")
    found = gradients_of_first_step(config, tmp_path / "run", monkeypatch)
    norm = torch.cat([gradient.flatten() for gradient in found]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)
