"""The general deformable convolution's kernels, driven by their plans, against the fp64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from degmix_kernels import launch
from degmix_kernels.deform_conv import reference
from degmix_kernels.deform_conv.general import plan as general
from degmix_kernels.deform_conv.problem import Problem
from degmix_kernels.testing import assert_close

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """Sizes of one call; ``last`` says which of offset, mask, and output and gradient are channels_last."""

    batch: int
    channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    groups: int = 1
    offset_groups: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    mask: bool = True
    bias: bool = True
    dtype: torch.dtype = FP32
    wild: float = 2.0
    last: tuple[bool, bool, bool] = (False, False, False)

    def draw(self, device: torch.device) -> tuple[Problem, Tensor | None, Tensor]:
        """The call, its bias, and a gradient of its output."""
        generator = torch.Generator().manual_seed(7)

        def tensor(*shape: int, last: bool = False, dtype: torch.dtype = self.dtype) -> Tensor:
            values = torch.randn(shape, generator=generator).to(device, dtype)
            return values.contiguous(memory_format=torch.channels_last) if last else values

        out_size = [
            (self.size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in (0, 1)
        ]
        sampled = self.offset_groups * self.kernel[0] * self.kernel[1]
        problem = Problem(
            tensor(self.batch, self.channels, *self.size, last=True),
            tensor(self.batch, 2 * sampled, *out_size, last=self.last[0], dtype=FP32) * self.wild,
            tensor(self.out_channels, self.channels // self.groups, *self.kernel, last=True),
            tensor(self.batch, sampled, *out_size, last=self.last[1]) if self.mask else None,
            self.stride,
            self.padding,
            self.dilation,
        )
        bias = tensor(self.out_channels) if self.bias else None
        return problem, bias, tensor(self.batch, self.out_channels, *out_size, last=self.last[2])


CASES = (
    Case(2, 32, 6, (4, 5), (2, 3), groups=2, padding=(1, 1), dilation=(1, 2)),
    Case(1, 51, 20, (5, 3), (3, 3), offset_groups=3, stride=(2, 1), padding=(1, 1), mask=False, wild=30,
         last=(True, False, True)),
    Case(1, 48, 40, (5, 3), (3, 2), offset_groups=3, padding=(1, 1), dilation=(2, 1), bias=False, dtype=BF16,
         last=(True, False, False)),
    Case(1, 96, 300, (3, 3), (1, 1), groups=2, offset_groups=3, dtype=FP16, last=(False, True, False)),
    Case(2, 80, 5, (3, 13), (1, 5), padding=(0, 2), dtype=BF16, last=(False, True, True)),
    Case(1, 16, 1, (1, 1), (1, 1), mask=False, bias=False),
    Case(3, 17, 33, (9, 8), (1, 1), dtype=BF16),
)  # fmt: skip


def undefined(tensor: Tensor) -> Tensor:
    """An unwritten result."""
    return torch.full_like(tensor, torch.nan)


def run(problem: Problem, bias: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    """The output and every gradient by the kernels."""
    device = problem.input.device
    output = undefined(grad)
    launch.run(general.plan_forward(problem, bias, output), device)
    results = {"output": output, "input": torch.zeros_like(problem.input, dtype=FP32)}
    results["offset"] = undefined(problem.offset)
    results["mask"] = None if problem.mask is None else undefined(problem.mask)
    gradients = (results["input"], results["offset"], results["mask"])
    launch.run(general.plan_backward_samples(problem, grad, *gradients, None), device)
    plan, partial = general.plan_backward_weight(problem, grad)
    launch.run(plan, device)
    results["weight"] = general.finish_weight(partial.sum(0), problem.weight)
    return {name: value for name, value in results.items() if value is not None}


def expect(problem: Problem, bias: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    """The same by the reference in fp64."""
    leaves = {name: getattr(problem, name) for name in ("input", "offset", "weight", "mask")}
    leaves = {name: t.double().requires_grad_() for name, t in leaves.items() if t is not None}
    output = reference.deform_conv2d(
        leaves["input"], leaves["offset"], leaves["weight"], None if bias is None else bias.double(),
        problem.stride, problem.padding, problem.dilation, leaves.get("mask"),
    )  # fmt: skip
    gradients = torch.autograd.grad(output, list(leaves.values()), grad.double())
    return {"output": output, **dict(zip(leaves, gradients, strict=True))}


def reduction(problem: Problem) -> int:
    pixels = problem.batch * problem.out_pixels
    return max(pixels, problem.group_channels * problem.taps, problem.weight.shape[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.channels}-{case.out_channels}")
def test_values_and_gradients(case: Case, device: torch.device) -> None:
    problem, bias, grad = case.draw(device)
    assert general.suits(problem)
    expected = expect(problem, bias, grad)
    for name, value in run(problem, bias, grad).items():
        assert_close(value, expected[name], reduction(problem), case.dtype, name)


def test_small_groups_go_elsewhere(device: torch.device) -> None:
    for case in (
        Case(1, 15, 4, (3, 3), (1, 1)),
        Case(1, 32, 4, (3, 3), (1, 1), groups=4),
        Case(1, 32, 4, (3, 3), (1, 1), offset_groups=4),
        Case(1, 96, 6, (3, 3), (1, 1), groups=2, offset_groups=32),
    ):
        assert not general.suits(case.draw(device)[0])


def test_64_bit_addresses(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, bias, grad = CASES[0].draw(device)
    narrow = run(problem, bias, grad)
    monkeypatch.setattr(general, "needs_64_bit", lambda *tensors: True)
    for name, value in run(problem, bias, grad).items():
        assert torch.allclose(value, narrow[name], atol=1e-5), name


def test_special_offsets_and_masks(device: torch.device) -> None:
    """On integers, on the edges, far outside, infinite, NaN: as the reference, nothing read out of bounds."""
    problem, bias, grad = CASES[0].draw(device)
    special = [0.0, 1.0, -1.0, 4.0, 5.0, -2.0, 3e4, -1e30, torch.inf, -torch.inf, torch.nan]
    offset = problem.offset.clone()
    offset.view(-1)[: 7 * len(special) : 7] = torch.tensor(special, device=device)
    offset[0, 5, 3, 1] = -1.0  # keeps the sample with the NaN on the map horizontally
    mask = problem.mask.clone()
    mask[1, 2, 1, 1], offset[1, 4:6, 1, 1] = torch.nan, 0.25  # on the map
    mask[1, 3, 0, 0] = 0.0
    problem = replace(problem, offset=offset, mask=mask)
    expected = expect(problem, bias, grad)
    for name, value in run(problem, bias, grad).items():
        wrong = expected[name].isnan()
        assert torch.equal(value.isnan(), wrong), name
        assert_close(value.nan_to_num(), expected[name].nan_to_num(), reduction(problem), name=name)
    assert expected["offset"].isnan().any()
    assert not expected["offset"].isnan().all()


def test_fixed_point(device: torch.device) -> None:
    problem, bias, grad = CASES[1].draw(device)
    sums = torch.zeros_like(problem.input, dtype=torch.int64)
    scale = torch.tensor(2.0**40, device=device)
    launch.run(general.plan_backward_samples(problem, grad, sums, None, None, scale), device)
    assert_close(sums.double() / scale, expect(problem, bias, grad)["input"], reduction(problem), FP32)


def test_an_empty_batch_launches_nothing(device: torch.device) -> None:
    problem, bias, grad = replace(CASES[0], batch=0).draw(device)
    results = run(problem, bias, grad)
    assert results["weight"].eq(0).all()
