"""The general deformable convolution's kernels, driven by their plans, against the fp64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from deform_conv_cases import Call
from torch import Tensor

from degmix_kernels import launch
from degmix_kernels.deform_conv.general import plan as general
from degmix_kernels.testing import assert_close

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CASES = (
    Call(2, 32, 6, (4, 5), (2, 3), groups=2, padding=(1, 1), dilation=(1, 2)),
    Call(1, 51, 20, (5, 3), (3, 3), offset_groups=3, stride=(2, 1), padding=(1, 1), masked=False, spread=4,
         last="offset grad"),
    Call(1, 48, 40, (5, 3), (3, 2), offset_groups=3, padding=(1, 1), dilation=(2, 1), biased=False,
         dtype=BF16, last="offset"),
    Call(1, 96, 300, (3, 3), (1, 1), groups=2, offset_groups=3, dtype=FP16, last="mask"),
    Call(2, 80, 5, (3, 13), (1, 5), padding=(0, 2), dtype=BF16, last="mask grad"),
    Call(1, 16, 1, (1, 1), (1, 1), masked=False, biased=False),
    Call(3, 17, 33, (9, 8), (1, 1), dtype=BF16),
)  # fmt: skip


def tensors_of(call: Call, device: torch.device) -> dict[str, Tensor | None]:
    """These kernels read channels_last maps and weights."""
    return replace(call, last=f"{call.last} input weight").draw(device)


def undefined(tensor: Tensor) -> Tensor:
    """An unwritten result."""
    return torch.full_like(tensor, torch.nan)


def run(call: Call, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The output and every gradient by the kernels."""
    problem, grad = call.problem(tensors), tensors["grad"]
    assert general.suits(problem)
    device = problem.input.device
    output = undefined(grad)
    launch.run(general.plan_forward(problem, tensors["bias"], output), device)
    results = {"output": output, "input": torch.zeros_like(problem.input, dtype=FP32)}
    results["offset"] = undefined(problem.offset)
    results["mask"] = None if problem.mask is None else undefined(problem.mask)
    gradients = (results["input"], results["offset"], results["mask"])
    launch.run(general.plan_backward_samples(problem, grad, *gradients, None), device)
    plan, partial = general.plan_backward_weight(problem, grad)
    launch.run(plan, device)
    results["weight"] = general.finish_weight(partial.sum(0), problem.weight)
    return {name: value for name, value in results.items() if value is not None}


def check(call: Call, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Compare these with the reference's, which are returned: NaN in the same places, and the rest."""
    output, leaves = call.exact(tensors)
    output.backward(tensors["grad"].double())
    expected = {"output": output, **{name: leaf.grad for name, leaf in leaves.items()}}
    for name, value in run(call, tensors).items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name
        assert_close(value.nan_to_num(), expected[name].nan_to_num(), call.reduction, call.dtype, name)
    return expected


@pytest.mark.parametrize("call", CASES, ids=lambda call: f"{call.channels}-{call.out_channels}")
def test_values_and_gradients(call: Call, device: torch.device) -> None:
    expected = check(call, tensors_of(call, device))
    assert not any(value.isnan().any() for value in expected.values())


def test_small_groups_go_elsewhere(device: torch.device) -> None:
    for call in (
        Call(1, 15, 4, (3, 3), (1, 1)),
        Call(1, 32, 4, (3, 3), (1, 1), groups=4),
        Call(1, 32, 4, (3, 3), (1, 1), offset_groups=4),
        Call(1, 96, 6, (3, 3), (1, 1), groups=2, offset_groups=32),
    ):
        assert not general.suits(call.problem(tensors_of(call, device)))


def test_64_bit_addresses(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tensors_of(CASES[0], device)
    narrow = run(CASES[0], tensors)
    monkeypatch.setattr(general, "needs_64_bit", lambda *tensors: True)
    for name, value in run(CASES[0], tensors).items():
        assert torch.allclose(value, narrow[name], atol=1e-5), name


@pytest.mark.parametrize("offset_groups", [1, 2])
def test_special_offsets_and_masks(offset_groups: int, device: torch.device) -> None:
    """On integers, on the edges, far outside, infinite, NaN: as the reference, nothing read out of bounds."""
    call = replace(CASES[0], offset_groups=offset_groups)
    tensors = tensors_of(call, device)
    offset, mask = tensors["offset"], tensors["mask"]
    special = [0.0, 1.0, -1.0, 4.0, 5.0, -2.0, 3e4, -1e30, torch.inf, -torch.inf, torch.nan]
    offset.view(-1)[: 7 * len(special) : 7] = torch.tensor(special, device=device)
    offset[0, 5, 3, 1] = -1.0  # keeps the sample with the NaN on the map horizontally
    offset[1, 0, 2, 2], offset[1, 1, 2, 2] = torch.nan, 9.0  # off the map horizontally
    offset[1, 2, 3, 0], offset[1, 3, 3, 0] = 9.0, torch.nan
    mask[1, 2, 1, 1], offset[1, 4:6, 1, 1] = torch.nan, 0.25  # on the map
    mask[1, 3, 0, 0] = 0.0
    expected = check(call, tensors)
    assert expected["offset"].isnan().any()
    assert not expected["offset"].isnan().all()


def test_fixed_point(device: torch.device) -> None:
    call, tensors = CASES[1], tensors_of(CASES[1], device)
    problem, (output, leaves) = call.problem(tensors), call.exact(tensors)
    output.backward(tensors["grad"].double())
    sums = torch.zeros_like(problem.input, dtype=torch.int64)
    scale = torch.tensor(2.0**40, device=device)
    launch.run(general.plan_backward_samples(problem, tensors["grad"], sums, None, None, scale), device)
    assert_close(sums.double() / scale, leaves["input"].grad, call.reduction, FP32)


def test_an_empty_batch_launches_nothing(device: torch.device) -> None:
    call = replace(CASES[0], batch=0)
    assert run(call, tensors_of(call, device))["weight"].eq(0).all()
