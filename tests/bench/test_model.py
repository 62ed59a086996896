"""The head and the whole model on a CPU: their rows, a wrong head, and what a step of training changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from bench.cases import model
from bench.cases.model import BACKBONE, CASES, FORMULA, HEAD, WHOLE
from bench.cases.op import Draw
from bench.cases.shapes import NYUD, QUICK, SWIN_TINY
from bench.harness import measure
from bench.harness.case import COMPILED, MODES, Case, Problem
from bench.harness.check import Checker
from bench.harness.measure import call_of
from bench.harness.results import OK, OURS, Ceilings, Row
from bench.harness.run import run
from bench.harness.selection import Selection
from degmix import DeGMixHead, build
from degmix.config import Config, load_config
from degmix.model import backbone
from degmix.tasks import TASKS, task_channels
from degmix_kernels.testing import relative_l2

CPU = torch.device("cpu")
EXACT = 1e-3  # relative error that ours may have in fp32


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "FEWEST", 1)


def case_of(op: str, shape: str, mode: str) -> Case:
    (case,) = (case for case in CASES if (case.op, case.shape) == (op, shape) and mode in case.modes)
    return case


def measured(*cases: Case) -> list[Row]:
    selection = Selection(cases, MODES, ("fp32",), None, seconds=0)
    return [row for more in run(selection, CPU, Ceilings(None, {}), str) for row in more]


def quick_rows(op: str) -> list[Row]:
    return measured(*(case_of(op, QUICK, mode) for mode in model.MODES))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])


def training_step() -> Problem:
    return case_of(WHOLE, QUICK, "fwdbwd").prepare(CPU, torch.float32)


@pytest.mark.parametrize("op", [HEAD, WHOLE])
def test_every_implementation_has_both_rows(op: str, torchvision: ModuleType) -> None:
    rows = quick_rows(op)
    expected = {(mode, name) for mode in model.MODES.values() for name in (OURS, FORMULA, COMPILED)}
    assert {(row.mode, row.impl) for row in rows} == expected
    for row in rows:
        assert row.images == 2
        if row.impl == COMPILED:
            assert row.status == "not available: needs a GPU"
        else:
            assert row.status == OK
            assert row.rel_error < EXACT
            assert row.ms > 0


FAILS, FAILS_IN_TRAINING = 2 * ["check failed: "], [OK, "check failed: gradients: "]


@pytest.mark.parametrize(
    ("op", "change", "statuses"),
    [
        (HEAD, lambda y: 1.01 * y, FAILS),
        (WHOLE, lambda y: 1.01 * y, FAILS),
        (WHOLE, lambda y: 1.01 * y - 0.01 * y.detach(), FAILS_IN_TRAINING),
    ],
)
def test_a_wrong_head_is_not_timed(
    op: str,
    change: Callable[[Tensor], Tensor],
    statuses: list[str],
    torchvision: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = DeGMixHead.forward

    def wrong(self: DeGMixHead, *arguments: object) -> dict[str, Tensor]:
        return {task: change(each) for task, each in right(self, *arguments).items()}

    monkeypatch.setattr(DeGMixHead, "forward", wrong)
    rows = quick_rows(op)
    for row, status in zip([row for row in rows if row.impl == OURS], statuses, strict=True):
        assert row.status.startswith(status)
        assert (row.ms is None) == row.failed
    assert all(row.status == OK for row in rows if row.impl == FORMULA)


def test_implementations_start_from_the_same_weights(torchvision: ModuleType) -> None:
    """Each has its own, and a problem made later begins where this one began."""
    problem = training_step()
    ours, others = problem.runs[OURS](), [problem.runs[FORMULA](), problem.exact()]
    call = call_of(ours, "fwdbwd", torch.float32)
    others.append(training_step().runs[OURS]())
    start = {name: leaf.detach().clone() for name, leaf in ours.leaves.items()}
    call.step(call.prepare())
    for other in others:
        assert other.leaves.keys() == start.keys()
        for name, leaf in other.leaves.items():
            assert torch.equal(leaf, start[name].to(leaf.dtype)), name
    torch.testing.assert_close(others[0].forward()[0], others[2].forward()[0])


def test_only_timed_calls_train() -> None:
    """They do what ``degmix train`` does: SGD on the sum of losses."""
    problem = training_step()
    training = problem.runs[OURS]()
    leaves = list(training.leaves.values())
    start = [leaf.detach().clone() for leaf in leaves]
    Checker(problem, gradients=True).check(training, gradients=True, limit=math.inf)
    call = call_of(training, "fwdbwd", torch.float32)
    assert all(map(torch.equal, leaves, start))
    loss = training.forward()[0]
    gradients = torch.autograd.grad(loss, leaves)
    call.step(call.prepare())
    settings = Config().train
    wanted = [
        -settings.lr * (gradient + settings.weight_decay * before)
        for gradient, before in zip(gradients, start, strict=True)
    ]
    made = [leaf.detach() - before for leaf, before in zip(leaves, start, strict=True)]
    assert relative_l2(flat(made), flat(wanted)) < EXACT
    assert all(leaf.grad is None for leaf in leaves)
    for _ in range(5):
        call.step(call.prepare())
    assert training.forward()[0] < loss


def test_without_timm_there_is_no_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "import_timm", Mock(side_effect=ImportError("needs timm")))
    model._untrained.cache_clear()
    rows = measured(*(case_of(WHOLE, "nyud b1", mode) for mode in model.MODES))
    assert len(rows) == 6
    assert {row.status for row in rows} == {"not available: needs timm"}


def test_the_backbone_is_that_of_the_recipe(timm: ModuleType) -> None:
    """As the head has its maps; and twice the same in training, so that implementations can be compared."""
    assert load_config("nyud_swin_t").model.backbone == BACKBONE
    whole = copy.deepcopy(model._untrained(BACKBONE, ("depth",), 1, 16)).train()
    assert whole.backbone.channels == SWIN_TINY
    picture = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    once, again = whole(picture)["depth"], whole(picture)["depth"]
    assert torch.equal(once, again)


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_what_losses_take(task: str) -> None:
    shape = replace(NYUD, batch=2, picture=(161, 170))
    channels = task_channels([task], shape.classes)[task]
    labels = model._labels(Draw(CPU, torch.float32), task, channels, shape)
    loss = build.build_losses(Config(tasks=(task,)))[task]
    logits = torch.zeros(2, channels, *shape.picture, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(logits, labels), logits)
    assert gradient.isfinite().all()
    unlabelled = (gradient == 0).all(dim=1).double().mean()
    assert 0.01 < unlabelled < 0.3
