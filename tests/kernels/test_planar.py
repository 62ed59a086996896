"""The planar kernels of the deformable convolution, by their plans, against the fp64 reference."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from deform_conv_cases import F64, Call
from torch import Tensor

from degmix_kernels.activation import activate
from degmix_kernels.deform_conv.general import plan as general
from degmix_kernels.deform_conv.path import fixed_point_scale
from degmix_kernels.deform_conv.planar import blocks as planar_blocks
from degmix_kernels.deform_conv.planar import plan as planar
from degmix_kernels.deform_conv.problem import Problem
from degmix_kernels.epilogue import Epilogue
from degmix_kernels.launch import run
from degmix_kernels.statistics import Statistics, finish_statistics
from degmix_kernels.testing import assert_close, poisoned_empty, relative_l2


def case(channels: int, out_channels: int, offset_groups: int, **others: Any) -> Call:
    """By default of 3×3 taps with padding."""
    usual = {"batch": 2, "size": (4, 5), "kernel": (3, 3), "padding": (1, 1), "masked": False, "spread": 1.5}
    return Call(channels=channels, out_channels=out_channels, offset_groups=offset_groups, **usual | others)


CASES = {
    "per-channel 1x1": case(20, 17, 20, kernel=(1, 1), padding=(0, 0), masked=True),
    "per-channel 1x1 channels_last": case(
        3, 2, 3, kernel=(1, 1), padding=(0, 0), masked=True, last="input offset mask grad"
    ),
    "per-channel 3x3": case(5, 3, 5),
    "8 groups of 1": case(8, 4, 8, kernel=(2, 1), masked=True),
    "8 groups of 3": case(24, 4, 8, kernel=(1, 2), dtype=torch.bfloat16, batch=1),
    "8 groups of 4": case(32, 18, 8, kernel=(1, 3), masked=True, last="weight offset", dtype=torch.float16),
    "8 groups of 5": case(40, 4, 8, kernel=(1, 2), batch=1, last="input"),
    "8 groups of 8": case(64, 4, 8, kernel=(2, 1), batch=1, last="grad mask", masked=True),
    "16 groups of 1": case(16, 4, 16, kernel=(1, 2), dtype=torch.bfloat16, offset_dtype=torch.bfloat16),
    "16 groups of 3": case(48, 4, 16, kernel=(1, 2), batch=1),
    "16 groups of 4": case(64, 4, 16, kernel=(1, 1), padding=(0, 0), batch=1),
    "16 groups of 5": case(80, 4, 16, kernel=(1, 1), padding=(0, 0), batch=1, size=(3, 3)),
    "16 groups of 8": case(128, 4, 16, kernel=(1, 1), padding=(0, 0), batch=1, size=(3, 3)),
    "depthwise": case(20, 20, 4, groups=20, kernel=(1, 2), masked=True, size=(3, 3)),
    "depthwise, one offset group": case(19, 38, 1, groups=19, kernel=(2, 1), last="input weight"),
    "groups across offset groups": case(
        6,
        4,
        3,
        groups=2,
        kernel=(3, 2),
        stride=(2, 1),
        padding=(1, 0),
        dilation=(2, 1),
        size=(6, 5),
        masked=True,
    ),
    "17 channels per offset group": case(
        34, 17, 2, groups=17, kernel=(1, 2), masked=True, batch=1, size=(3, 3)
    ),
    "65 channels per offset group": case(65, 65, 1, groups=65, kernel=(1, 1), padding=(0, 0), size=(2, 3)),
    "groups of 18, offset groups of 4": case(36, 4, 9, groups=2, kernel=(1, 1), padding=(0, 0), batch=1),
    "groups of 24, offset groups of 16": case(48, 4, 3, groups=2, kernel=(1, 2), batch=1),
    "more than a block of out channels": case(3, 270, 3, kernel=(1, 1), padding=(0, 0), size=(2, 3), batch=1),
    "more than a block of pixels": case(2, 2, 2, kernel=(1, 1), padding=(0, 0), size=(7, 11)),
    "one pixel": case(1, 1, 1, size=(1, 1), batch=1),
}


def gradients(
    problem: Problem,
    grad: Tensor,
    epilogue: Epilogue | None = None,
    deterministic: bool = False,
    bias: bool = False,
) -> dict[str, Tensor]:
    """All gradients, as the kernels compute them."""
    device = grad.device
    results = {"offset": torch.empty_like(problem.offset)}
    if problem.mask is not None:
        results["mask"] = torch.empty_like(problem.mask)
    scale = fixed_point_scale(problem, grad, epilogue) if deterministic else None
    sums = torch.zeros_like(problem.input, dtype=torch.int64 if deterministic else torch.float32)
    run(
        planar.plan_backward_samples(
            problem, grad, sums, results["offset"], results.get("mask"), scale, epilogue
        ),
        device,
    )
    results["input"] = sums.double() / scale if deterministic else sums
    plan, partial, bias_partial = planar.plan_backward_weight(problem, grad, epilogue, bias)
    run(plan, device)
    results["weight"] = planar.finish_weight(partial.sum(0), problem.weight)
    if bias:
        results["bias"] = bias_partial.sum(0)
    return results


def compare(actual: dict[str, Tensor], leaves: dict[str, Tensor], call: Call) -> None:
    for name, value in actual.items():
        assert_close(value, leaves[name].grad, call.reduction, call.dtype, name)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, device: torch.device) -> None:
    call = CASES[name]
    tensors = call.draw(device)
    problem = call.problem(tensors)
    expected, leaves = call.exact(tensors)
    expected.backward(tensors["grad"].double())
    with poisoned_empty():
        output = torch.empty_like(tensors["grad"])
        run(planar.plan_forward(problem, tensors["bias"], output), device)
        assert_close(output, expected, call.reduction)
        compare(gradients(problem, tensors["grad"]), leaves, call)


@pytest.mark.parametrize("name", ["per-channel 1x1", "groups across offset groups"])
@pytest.mark.parametrize("wide", [False, True])
def test_addresses_of_both_widths(
    name: str, wide: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planar_blocks, "needs_64_bit", lambda *tensors: wide)
    test_values_and_gradients(name, device)
    tensors = CASES[name].draw(device)
    plan = planar.plan_forward(CASES[name].problem(tensors), None, tensors["grad"])
    assert plan.constants["INDEX_64"] == wide


def test_shares_of_the_pixels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More shares of the weight gradient than blocks of pixels: the last end past the batch."""
    monkeypatch.setattr(Problem, "weight_splits", lambda problem, programs: 3)
    test_values_and_gradients("8 groups of 1", device)
    test_values_and_gradients("more than a block of pixels", device)


@pytest.mark.parametrize(
    ("activation", "name", "dtype"),
    [
        *((each, "per-channel 1x1", torch.float32) for each in ("gelu", "relu", "silu", "identity")),
        ("gelu", "groups across offset groups", torch.bfloat16),
    ],
)
def test_epilogue(activation: str, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Activation, the value before it, statistics far from 0, and the gradient of all of them."""
    last = "grad" * (activation == "relu")
    call = replace(CASES[name], dtype=dtype, last=last)
    if dtype == torch.float32:
        call = replace(call, size=(7, 11), out_channels=6)
    tensors, out = call.draw(device), call.out_channels
    problem = call.problem(tensors)
    constant, linear = torch.linspace(-1, 2, out, device=device), torch.linspace(1, -1, out, device=device)
    if dtype != torch.float32:
        constant, linear = None, None
    expected_pre, leaves = call.exact(tensors)
    expected = activate(expected_pre, activation)
    loss = (tensors["grad"].double() * expected).sum((0, 2, 3))
    if linear is not None:
        loss = loss + constant.double() * expected.sum((0, 2, 3))
        loss = loss + linear.double() * expected.square().sum((0, 2, 3)) / 2
    loss.sum().backward()
    with poisoned_empty():
        output, pre = torch.empty_like(tensors["grad"]), torch.empty_like(tensors["grad"])
        statistics = planar.new_statistics(problem)
        run(planar.plan_forward(problem, tensors["bias"], output, activation, pre, statistics), device)
        mean, variance = finished(statistics, problem.out_pixels)
        assert_close(output, expected, call.reduction)
        assert_close(pre, expected_pre, call.reduction)
        assert_close(mean, expected.mean((0, 2, 3)), call.reduction, dtype)
        assert_close(variance, expected.var((0, 2, 3), unbiased=False), call.reduction, dtype)
        epilogue = Epilogue(activation, pre, constant, linear)
        compare(gradients(problem, tensors["grad"], epilogue, bias=True), leaves, call)


def finished(statistics: Statistics, pixels: int) -> tuple[Tensor, Tensor]:
    mean, variance = (statistics.means.new_empty(statistics.means.shape[1]) for _ in range(2))
    finish_statistics(statistics, pixels, mean, variance)
    return mean, variance


def test_statistics_far_from_zero(device: torch.device) -> None:
    """A mean of a thousand standard deviations leaves the variance its digits."""
    call = replace(CASES["more than a block of pixels"], size=(7, 17))
    tensors = call.draw(device)
    tensors["bias"] = tensors["bias"].sign() * 3e3
    problem = call.problem(tensors)
    output, statistics = torch.empty_like(tensors["grad"]), planar.new_statistics(problem)
    run(planar.plan_forward(problem, tensors["bias"], output, statistics=statistics), device)
    mean, variance = finished(statistics, problem.out_pixels)
    expected = call.exact(tensors)[0]
    assert (expected.mean((0, 2, 3)).abs() > 1e3 * expected.std((0, 2, 3))).all()
    assert relative_l2(mean, expected.mean((0, 2, 3))) < 1e-6
    # Values near 3000 have fp32 steps of 2e-4, a ten-thousandth of the deviation.
    assert relative_l2(variance, expected.var((0, 2, 3), unbiased=False)) < 1e-4


def test_chan_formula_of_unequal_parts(device: torch.device) -> None:
    values = torch.randn(3, 10, 2, dtype=F64, generator=torch.Generator().manual_seed(0)).to(device) + 1e3
    parts = [image[start : start + 4] for image in values for start in (0, 4, 8)]
    statistics = Statistics(
        torch.stack([part.mean(0) for part in parts]).float(),
        torch.stack([(part - part.mean(0)).square().sum(0) for part in parts]).float(),
        4,
    )
    mean, variance = finished(statistics, 10)
    flat = values.flatten(0, 1)
    assert relative_l2(mean, flat.mean(0)) < 1e-7
    assert relative_l2(variance, flat.var(0, unbiased=False)) < 1e-3
    # NaN would spoil the gradients of a normalisation's parameters.
    assert not any(part.any() for part in finished(planar.new_statistics(_empty_batch(device)), 20))


def _empty_batch(device: torch.device) -> Problem:
    call = replace(CASES["per-channel 3x3"], batch=0)
    return call.problem(call.draw(device))


def test_batch_0_plans_no_programs(device: torch.device) -> None:
    problem = _empty_batch(device)
    grad = torch.empty(0, 3, 4, 5)
    plan, partial, bias_partial = planar.plan_backward_weight(problem, grad, bias=True)
    assert plan.programs == 0
    assert not partial.any()
    assert not bias_partial.any()
    assert planar.plan_forward(problem, None, grad).programs == 0
    assert planar.plan_backward_samples(problem, grad, None, problem.offset, None, None).programs == 0


@pytest.mark.parametrize("name", ["8 groups of 3", "per-channel 1x1"])
def test_fixed_point_input_gradient(name: str, device: torch.device) -> None:
    call = replace(CASES[name], dtype=torch.float32)
    tensors = call.draw(device)
    expected, leaves = call.exact(tensors)
    pre = expected.detach().to(tensors["grad"]).contiguous()
    linear = torch.full((call.out_channels,), 3.0, device=device)
    loss = torch.nn.functional.gelu(expected)
    for magnitude in (1e-15, 1.0, 1e15):
        grad = tensors["grad"] * magnitude
        for leaf in leaves.values():
            leaf.grad = None
        y = loss.detach()
        loss.backward(grad.double() + 3.0 * magnitude * y, retain_graph=True)
        epilogue = Epilogue("gelu", pre, None, linear * magnitude)
        actual = gradients(call.problem(tensors), grad, epilogue, deterministic=True)
        assert_close(actual["input"], leaves["input"].grad, call.reduction, call.dtype)
    assert fixed_point_scale(call.problem(tensors), grad * torch.inf).isnan()
    assert fixed_point_scale(call.problem(tensors), grad * 0) == 2.0**126


@pytest.mark.parametrize(
    "name", ["per-channel 1x1", "depthwise", "groups across offset groups", "8 groups of 3"]
)
def test_undefined_values_stay_where_they_belong(name: str, device: torch.device) -> None:
    """NaN in input, offset and gradient spoils what it spoils in the reference, no more; so does infinity."""
    call = replace(CASES[name], dtype=torch.float32, batch=2)
    tensors = call.draw(device)
    tensors["input"][0, 1, 2, 2] = torch.nan
    tensors["input"][0, call.channels - 1, 0, 0] = torch.inf
    tensors["offset"][0, 0, 1, 1] = torch.nan
    tensors["offset"][0, -1, 0, 0] = torch.nan
    tensors["offset"][0, 0, 1, 3], tensors["offset"][0, 1, 1, 3] = torch.nan, 9.0  # off the map horizontally
    tensors["offset"][0, 0, 0, 2], tensors["offset"][0, 1, 0, 2] = 9.0, torch.nan
    tensors["offset"][1 % call.batch, 2, 0, 0] = torch.inf
    tensors["offset"][1 % call.batch, 1, 0, 1] = -torch.inf
    tensors["grad"][0, 0, 0, 1] = torch.nan
    tensors["grad"][0, call.out_channels // 4, 1, 0] = torch.nan
    expected, leaves = call.exact(tensors)
    expected.backward(tensors["grad"].double())
    problem = call.problem(tensors)
    with poisoned_empty():
        output = torch.empty_like(tensors["grad"])
        run(planar.plan_forward(problem, tensors["bias"], output), device)
        actual = {"output": output, **gradients(problem, tensors["grad"])}
    wanted = {"output": expected, **{name: leaf.grad for name, leaf in leaves.items()}}
    for what, value in actual.items():
        good = wanted[what].isfinite()
        assert torch.equal(value.isnan(), wanted[what].isnan()), what
        assert torch.equal(value.isfinite(), good), what
        assert_close(value[good], wanted[what][good], call.reduction, name=what)


def test_activation_of_nan(device: torch.device) -> None:
    call = case(1, 2, 1, kernel=(1, 1), padding=(0, 0))
    tensors = call.draw(device)
    problem, bias = call.problem(tensors), torch.tensor([torch.nan, 1.0], device=device)
    for activation in ("gelu", "relu", "silu"):
        output, pre = torch.empty_like(tensors["grad"]), torch.empty_like(tensors["grad"])
        run(planar.plan_forward(problem, bias, output, activation, pre), device)
        actual = gradients(problem, tensors["grad"], Epilogue(activation, pre), bias=True)
        for value in (output.transpose(0, 1), pre.transpose(0, 1), actual["weight"], actual["bias"]):
            assert value[0].isnan().all(), activation
            assert value[1].isfinite().all(), activation


def test_epilogue_needs_what_it_reads() -> None:
    with pytest.raises(ValueError, match="pre: expected a tensor"):
        Epilogue("gelu").arguments()
    assert Epilogue("identity", torch.ones(1)).arguments()["pre_ptr"] is None


def test_tiles_waste_less_than_half() -> None:
    """Rows of all tiles of all programs are at most twice the channels, or 32: a product takes 16."""

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    def divisors(number: int) -> list[int]:
        return [divisor for divisor in range(1, number + 1) if number % divisor == 0]

    for channels in (*range(1, 65), 72, 96, 120, 128, 192, 256):
        for groups, offset_groups in itertools.product(divisors(channels), repeat=2):
            problem = Problem(
                meta(1, channels, 32, 32), meta(1, 2 * offset_groups, 32, 32),
                meta(channels, channels // groups, 1, 1), None, (1, 1), (0, 0), (1, 1),
            )  # fmt: skip
            if general.suits(problem):
                continue
            output = meta(1, channels, 32, 32)
            forward = planar.plan_forward(problem, None, output)
            weight = planar.plan_backward_weight(problem, output)[0]
            samples = planar.plan_backward_samples(problem, output, output, problem.offset, None, None)
            for plan, tiles in (
                (forward, forward.arguments["spans"] * forward.arguments["steps"]),
                (weight, weight.arguments["spans"] * weight.arguments["tiles"]),
                (samples, samples.arguments["blocks"] * samples.arguments["within_steps"]),
            ):
                rows = plan.constants["BLOCK_GROUPS"] * plan.constants["BLOCK_WITHIN"]
                assert rows * tiles <= 2 * max(16, channels), (plan.kernel, channels, groups, offset_groups)
