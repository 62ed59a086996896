"""Faults planted in ops turn the tests red that are there for them: what looks inside ops does see it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_attention
import test_contract
import test_deform_conv
import test_deform_conv_memory
import torch
from contract import every_op
from launch_count import count_launches
from test_launch_count import test_triton_kernels_count as check_triton_kernels_count
from torch import Tensor

from bench.compiler.trace import launches_of
from degmix_kernels import launch, registry
from degmix_kernels.contract import Op
from degmix_kernels.deform_conv.path import Path


def planted(op: Op, monkeypatch: pytest.MonkeyPatch, before: Callable[..., object]) -> None:
    """Have an op's forward pass do something else, first."""
    original = op.op.forward

    def forward(call: object, *outputs: Tensor) -> None:
        before(call, *outputs)
        original(call, *outputs)

    monkeypatch.setattr(op.op, "forward", forward)


@every_op
def test_an_unwritten_element(op: Op, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    original = op.op.forward

    def forward(call: object, output: Tensor, *others: Tensor) -> None:
        copy = output.clone()
        original(call, copy, *others)
        written = torch.ones_like(output, dtype=torch.bool)
        written[..., -1] = False
        output.copy_(torch.where(written, copy, output))

    monkeypatch.setattr(op.op, "forward", forward)
    with pytest.raises(AssertionError, match="output: relative L2 error nan"):
        test_contract.test_values_and_gradients(op, torch.float32, device)


def test_an_allocation(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    name, original = next(iter(test_deform_conv_memory.REALISTIC)), Path.forward

    def forward(self: Path, problem: object, bias: Tensor | None, output: Tensor) -> None:
        columns = output.new_empty(problem.columns // 16)
        original(self, problem, bias, output)
        del columns

    arguments = name, "bf16", "contiguous", False, device
    test_deform_conv_memory.test_temporaries_are_small(*arguments)
    monkeypatch.setattr(Path, "forward", forward)
    with pytest.raises(AssertionError, match="temporaries take"):
        test_deform_conv_memory.test_temporaries_are_small(*arguments)


def test_a_copy(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    op, copies = registry.find("gated_attention"), []
    planted(op, monkeypatch, lambda call, *outputs: copies.extend(call.query.clone() for _ in range(9)))
    with pytest.raises(AssertionError):
        test_attention.test_no_matrix_of_all_pairs(device)
    x = torch.ones(1, 4, 5, 5, device=device)
    planted(registry.find("coordinate_bias"), monkeypatch, lambda call, *outputs: call.x.clone())
    tables = torch.ones(1, 2, 5, 3, device=device), torch.ones(1, 2, 3, 5, device=device)
    counts = count_launches(lambda: registry.find("coordinate_bias").function(x, *tables))
    assert counts["aten.clone"] == 1


def test_a_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(plan: launch.Launch) -> None:
        launch._launch(plan)
        launch._launch(plan)

    op = registry.find("deform_mix")
    alone = len(launches_of(op, torch.bfloat16))
    monkeypatch.setattr("degmix_kernels.deform_conv.mix_op.run", lambda plan, device: twice(plan))
    monkeypatch.setattr("degmix_kernels.deform_conv.path.run", lambda plan, device: twice(plan))
    assert len(launches_of(op, torch.bfloat16)) > alone
    with pytest.raises(AssertionError):
        check_triton_kernels_count(device)
    with pytest.raises(AssertionError):
        test_deform_conv.test_parts_of_the_batch(device, monkeypatch)
