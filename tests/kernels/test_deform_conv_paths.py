"""The kernels on both paths of the deformable convolution, at awkward sizes, against the fp64 reference."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from contract import compare, leaves_of, result_and_gradients
from deform_conv_cases import F64, Call, expected_kernels, forced_triton, kernels_of
from launches import recorded_launches
from torch import Tensor

from degmix_kernels import deform_conv2d, deform_mix
from degmix_kernels.activation import ACTIVATIONS
from degmix_kernels.deform_conv import reference
from degmix_kernels.deform_conv.general import plan as general
from degmix_kernels.deform_conv.planar import blocks as planar_blocks
from degmix_kernels.deform_conv.planar import plan as planar
from degmix_kernels.deform_conv.problem import Problem
from degmix_kernels.epilogue import Epilogue
from degmix_kernels.launch import Launch
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
        6, 4, 3, groups=2, kernel=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1), size=(6, 5),
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
    "general": case(32, 6, 1, kernel=(2, 3), groups=2, dilation=(1, 2), masked=True, last="input weight"),
    "general, channels_last": case(
        51, 20, 3, size=(5, 3), stride=(2, 1), spread=4.0, batch=1, last="input offset weight grad"
    ),
    "general, 40 out channels": case(
        48, 40, 3, size=(5, 3), kernel=(3, 2), dilation=(2, 1), masked=True, biased=False, batch=1,
        dtype=torch.bfloat16, last="input weight offset",
    ),
    "general, 300 out channels": case(
        96, 300, 3, size=(3, 3), kernel=(1, 1), padding=(0, 0), groups=2, masked=True, batch=1,
        dtype=torch.float16, last="input weight mask",
    ),
    "general, 80 channels": case(
        80, 5, 1, size=(3, 13), kernel=(1, 5), padding=(0, 2), masked=True, dtype=torch.bfloat16,
        last="mask grad",
    ),
    "general, one pixel": case(16, 1, 1, size=(1, 1), kernel=(1, 1), padding=(0, 0), biased=False, batch=1),
    "general, 17 channels": case(
        17, 33, 1, size=(9, 8), kernel=(1, 1), padding=(0, 0), masked=True, batch=3, last="input weight"
    ),
    "15 channels per offset group": case(15, 4, 1, size=(3, 3), kernel=(1, 1), padding=(0, 0), batch=1),
}  # fmt: skip


def check(call: Call, device: torch.device) -> list[Launch]:
    """Compare the output and all gradients; the launches."""
    tensors = call.draw(device)
    ours, exact = (partial(each, **call.geometry) for each in (deform_conv2d, reference.deform_conv2d))
    with forced_triton(), recorded_launches() as launches:
        compare(ours, exact, tensors, call.reduction, tensors.pop("grad"))
    assert kernels_of(launches) == expected_kernels(call)
    return launches


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, device: torch.device) -> None:
    check(CASES[name], device)


@pytest.mark.parametrize("name", ["per-channel 1x1", "groups across offset groups", "general"])
def test_64_bit_addresses(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (general, planar_blocks):
        monkeypatch.setattr(module, "needs_64_bit", lambda *tensors: True)
    assert all(launch.constants["INDEX_64"] for launch in check(CASES[name], device))


def test_shares_of_the_pixels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More shares of the weight gradient than blocks of pixels: the last end past the batch."""
    monkeypatch.setattr(Problem, "weight_splits", lambda problem, programs: 3)
    check(CASES["8 groups of 1"], device)
    check(CASES["more than a block of pixels"], device)


# --- values that are no numbers ----------------------------------------------------------------------------


def check_special_values(call: Call, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """What is NaN or infinite is so in the reference, which is returned, and the rest is close."""
    grad = tensors.pop("grad")
    ours, exact = (partial(each, **call.geometry) for each in (deform_conv2d, reference.deform_conv2d))
    with forced_triton(), poisoned_empty():
        actual = result_and_gradients(ours, leaves_of(tensors), grad)
    expected = result_and_gradients(exact, leaves_of(tensors, F64), grad)
    for name, value in actual.items():
        good = expected[name].isfinite()
        assert torch.equal(value.isnan(), expected[name].isnan()), name
        assert torch.equal(value.isfinite(), good), name
        assert_close(value[good], expected[name][good], call.reduction, name=name)
    return expected


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
    tensors["offset"][1, 2, 0, 0] = torch.inf
    tensors["offset"][1, 1, 0, 1] = -torch.inf
    tensors["grad"][0, 0, 0, 1] = torch.nan
    tensors["grad"][0, call.out_channels // 4, 1, 0] = torch.nan
    check_special_values(call, tensors)


@pytest.mark.parametrize("offset_groups", [1, 2])
def test_special_offsets_and_masks(offset_groups: int, device: torch.device) -> None:
    """On integers, on the edges, far outside, infinite, NaN: as the reference, nothing read out of bounds."""
    call = replace(CASES["general"], offset_groups=offset_groups)
    tensors = call.draw(device)
    offset, mask = tensors["offset"], tensors["mask"]
    special = [0.0, 1.0, -1.0, 4.0, 5.0, -2.0, 3e4, -1e30, torch.inf, -torch.inf, torch.nan]
    offset.view(-1)[: 7 * len(special) : 7] = torch.tensor(special, device=device)
    offset[0, 5, 3, 1] = -1.0  # keeps the sample with the NaN on the map horizontally
    offset[1, 0, 2, 2], offset[1, 1, 2, 2] = torch.nan, 9.0  # off the map horizontally
    offset[1, 2, 3, 0], offset[1, 3, 3, 0] = 9.0, torch.nan
    mask[1, 2, 1, 1], offset[1, 4:6, 1, 1] = torch.nan, 0.25  # on the map
    mask[1, 3, 0, 0] = 0.0
    expected = check_special_values(call, tensors)
    assert expected["offset"].isnan().any()
    assert not expected["offset"].isnan().all()


def test_activation_of_nan(device: torch.device) -> None:
    given = case(1, 2, 1, kernel=(1, 1), padding=(0, 0)).tensors(device=device)
    given |= {"x": given.pop("input"), "bias": torch.tensor([torch.nan, 1.0], device=device)}
    for activation in ("gelu", "relu", "silu"):
        with forced_triton():
            actual = result_and_gradients(partial(deform_mix, activation=activation), leaves_of(given))
        for value in (actual["output"].transpose(0, 1), actual["weight"], actual["bias"]):
            assert value[0].isnan().all(), activation
            assert value[1].isfinite().all(), activation


# --- what follows the product ------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation: str, device: torch.device) -> None:
    """Activation, statistics, and the gradient of all of them."""
    last = "grad" * (activation == "relu")
    call = replace(CASES["per-channel 1x1"], size=(7, 11), out_channels=6, masked=False, last=last)
    given = call.draw(device)
    given = {"x": given.pop("input"), "grad": given.pop("grad"), **given}
    grad, count = given.pop("grad"), call.batch * 7 * 11
    grads = grad, *(torch.linspace(*ends, 6, device=device) * count for ends in ((-1, 2), (0.5, -0.5)))
    results = []
    for function, dtype in ((deform_mix, torch.float32), (reference.deform_mix, F64)):
        leaves = leaves_of(given, dtype)
        with forced_triton(), poisoned_empty():
            outputs = function(**leaves, activation=activation, statistics=True)
            gradients = torch.autograd.grad(outputs, leaves.values(), [each.to(dtype) for each in grads])
        results.append([*outputs, *gradients])
    for name, *pair in zip(("output", "mean", "variance", *leaves), *results, strict=True):
        assert_close(*pair, call.reduction, torch.float32, name)


def test_chan_formula_of_unequal_parts(device: torch.device) -> None:
    def finished(statistics: Statistics, pixels: int) -> tuple[Tensor, Tensor]:
        mean, variance = (statistics.means.new_empty(2) for _ in range(2))
        finish_statistics(statistics, pixels, mean, variance)
        return mean, variance

    values = torch.randn(3, 10, 2, dtype=F64, generator=torch.Generator().manual_seed(0)).to(device) + 1e3
    parts = [image[start : start + 4] for image in values for start in (0, 4, 8)]
    means = torch.stack([part.mean(0) for part in parts]).float()
    squares = torch.stack([(part - part.mean(0)).square().sum(0) for part in parts]).float()
    mean, variance = finished(Statistics(means, squares, 4), 10)
    flat = values.flatten(0, 1)
    assert relative_l2(mean, flat.mean(0)) < 1e-7
    assert relative_l2(variance, flat.var(0, unbiased=False)) < 1e-3
    # NaN would spoil the gradients of a normalisation's parameters.
    assert not any(part.any() for part in finished(Statistics(means[:0], squares[:0], 4), 10))


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
