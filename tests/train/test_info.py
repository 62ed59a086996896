"""Costs counted on the meta device equal those of the real model."""

from __future__ import annotations

import gc

import pytest
import torch
from allocations import Allocations
from quick_run import QUICK

from degmix import build
from degmix.config import load_config
from degmix.info import cost_table, measure

CONFIG = load_config("demo", [*QUICK, "tasks=[semseg, depth]"])


def test_parameters_and_weights_are_the_models() -> None:
    cost = measure(CONFIG, (32, 48))
    model = build.build_model(CONFIG)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.weights_bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert sum(parameters for _, parameters, *_ in cost.parts) == cost.parameters


def test_macs_of_the_parts_add_up_and_grow_with_the_image() -> None:
    small, large, larger = (measure(CONFIG, (64, width)) for width in (64, 128, 192))
    assert sum(macs for *_, macs in small.parts) == small.macs > 0
    assert sum(macs for *_, macs, _ in small.parts) == small.formula_macs
    assert large.formula_macs == pytest.approx(2 * small.formula_macs, rel=1e-3)
    # The head merges matrices, which costs the same for any image.
    assert larger.macs - large.macs == pytest.approx(large.macs - small.macs, rel=1e-3)


@pytest.mark.parametrize("attention", ["released", "pixel", "linear", "global"])
def test_the_head_costs_less_than_its_formula(attention: str) -> None:
    changes = [*QUICK, "tasks=[semseg, depth]", f"model.attention={attention}"]
    cost = measure(load_config("demo", changes), (224, 224))
    assert cost.macs < cost.formula_macs
    for name, _, formula, macs in cost.parts:
        if name in ("backbone", "head.predictions"):
            assert macs == formula, name
        else:  # the mixers' tables of constant offsets take some, at any size of map
            assert macs <= 1.2 * formula, name


def test_table_shows_formula_and_head() -> None:
    cost = measure(CONFIG, (32, 48))
    table = cost_table(cost, "title")
    assert [str(column.header) for column in table.columns][2:] == ["GMACs, formula", "GMACs"]
    assert table.row_count == len(cost.parts) + 1


def test_the_memory_estimate_covers_what_autograd_saves() -> None:
    """On a real model as many bytes outlive the forward pass."""
    cost = measure(CONFIG, (32, 48))
    model = build.build_model(CONFIG).train()
    with Allocations(*model.parameters(), *model.buffers()) as seen:
        image = torch.zeros(1, 3, 32, 48)
        predictions = model(image)
    gc.collect()
    total = seen.alive() - sum(prediction.nbytes for prediction in predictions.values())
    assert cost.training_bytes - cost.weights_bytes - 8 * cost.parameters == pytest.approx(total, rel=0.02)
