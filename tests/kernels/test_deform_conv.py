"""Deformable convolution: the reference against torchvision, the public functions and modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from contract import deterministic_algorithms, draw
from deform_conv_cases import F64, PATHS, draw_all, forced_triton, per_channel_call
from launches import kernel_names, recorded_launches
from torch import Tensor
from torch.nn import functional

from degmix_kernels import DeformConv2d, DeformMix, deform_conv2d, deform_mix, launch, use_backend
from degmix_kernels.deform_conv import path, reference
from degmix_kernels.deform_conv.problem import Problem
from degmix_kernels.testing import assert_close, relative_l2, tolerance

# --- the kernels -------------------------------------------------------------------------------


def test_undefined_offsets(device: torch.device) -> None:
    """NaN spoils its own pixel only; infinities are samples outside the map, with zero gradients.

    This is the reference; test_deform_conv_paths.py compares the kernels with it.
    """
    given = per_channel_call(device)
    finite = given["offset"].clone()
    finite[1, 4, 0, 0], finite[1, 5, 0, 1] = 1e4, -1e4
    offset = finite.clone()
    offset[1, 4, 0, 0], offset[1, 5, 0, 1] = torch.inf, -torch.inf
    offset[0, 0, 1, 2] = offset[0, 3, 2, 2] = torch.nan
    results = []
    for values in (offset, finite):
        leaves = [given["input"].clone().requires_grad_(), values.requires_grad_()]
        output = reference.deform_conv2d(*leaves, given["weight"])
        results.append((output, *torch.autograd.grad(output, leaves, torch.ones_like(output))))
    (output, grad_input, grad_offset), (expected, _, expected_offset) = results
    undefined = torch.zeros_like(output, dtype=torch.bool)
    undefined[0, :, 1, 2] = undefined[0, :, 2, 2] = True
    assert torch.equal(output.isnan(), undefined)
    assert torch.equal(output[~undefined], expected[~undefined])
    assert not grad_input.isnan().any()
    nan = grad_offset.isnan()
    assert nan.nonzero().tolist() == [[0, 0, 1, 2], [0, 1, 1, 2], [0, 2, 2, 2], [0, 3, 2, 2]]
    assert torch.equal(grad_offset[~nan], expected_offset[~nan])
    assert grad_offset[1, 4:, 0, 0].tolist() == [0, 0]


def test_what_needs_64_bit_addresses() -> None:
    huge = torch.empty(2, 256, 2048, 4096, device="meta")
    assert launch.needs_64_bit(huge[:1, :1, :1, :1], None, huge)
    assert not launch.needs_64_bit(huge[:, :255, :2047, :2047].contiguous()[:1], huge[:1, :1, :1, :1])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (("input",), ["backward_samples"]),
        (("offset",), ["backward_samples"]),
        (("mask",), ["backward_samples"]),
        (("weight",), ["backward_weight"]),
        (("bias",), []),
        (("input", "weight"), ["backward_samples", "backward_weight"]),
    ],
)
def test_no_work_for_unwanted_gradients(
    wanted: tuple[str, ...], expected: list[str], device: torch.device
) -> None:
    given = per_channel_call(device)
    for name in wanted:
        given[name].requires_grad_()
    with use_backend("triton"):
        output = deform_conv2d(**given)
    with recorded_launches(execute=False) as launches:
        torch.autograd.grad(output, [given[name] for name in wanted], torch.ones_like(output))
    assert kernel_names(launches) == expected
    for plan in launches:
        for name in ("input", "offset", "mask"):
            if f"grad_{name}_ptr" in plan.arguments:
                assert (plan.arguments[f"grad_{name}_ptr"] is not None) == (name in wanted)


@pytest.mark.parametrize("name", [*PATHS, "mix"])
def test_deterministic_input_gradient(name: str, device: torch.device) -> None:
    """Fixed point is as exact as fp32, whatever the magnitude, behind an activation and a variance, too."""
    call = PATHS.get(name, replace(PATHS["per-channel"], masked=False))
    given, functions = call.tensors(device=device), (deform_conv2d, reference.deform_conv2d)
    options = call.geometry
    if name == "mix":
        given = {"x": given.pop("input"), **given}
        functions, options = (deform_mix, reference.deform_mix), {"statistics": True}

    def gradient(function: Callable, magnitude: float, dtype: torch.dtype, deterministic: bool) -> Tensor:
        values = {key: value.detach().to(dtype) for key, value in given.items()}
        leaf = next(iter(values.values())).requires_grad_()
        with forced_triton(), deterministic_algorithms(deterministic):
            outputs = function(**values, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [draw(*output.shape, seed=50).to(output) * magnitude for output in outputs]
        # The interpreter is deterministic either way: what is launched tells, outside of the region.
        with recorded_launches() as launches:
            (found,) = torch.autograd.grad(outputs, leaf, grads)
        assert {each.constants["FIXED_POINT"] for each in launches} <= {deterministic}
        return found

    ours, plain = functions
    for magnitude in (1e-20, 1.0, 1e20):
        floating, fixed = (gradient(ours, magnitude, torch.float32, each) for each in (False, True))
        expected = gradient(plain, magnitude, F64, False)
        assert_close(fixed, expected, 120)
        assert relative_l2(fixed, expected) <= 1.2 * relative_l2(floating, expected)


def test_scale_of_the_fixed_point(device: torch.device) -> None:
    given = per_channel_call(device)
    problem = Problem(given["input"], given["offset"], given["weight"], None, (1, 1), (0, 0), (1, 1))
    grad = torch.ones(2, 4, 5, 6, device=device)
    assert path.fixed_point_scale(problem, grad * torch.inf).isnan()
    assert path.fixed_point_scale(problem, grad * 0) == 2.0**126


def test_parts_of_the_batch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result, whether the batch is copied and summed as a whole or an image at a time."""
    shapes = (5, 16, 3, 4), (5, 6, 3, 4), (3, 16, 1, 3), (3,), (5, 3, 3, 4)
    values = [value.to(device) for value in draw_all(0, *shapes, dtype=torch.float32)]
    results = []
    for share in (1e-9, 0.15, 1e9):
        monkeypatch.setattr(path, "PART_SHARE", share)
        leaves = [value.clone().requires_grad_() for value in values]
        with use_backend("triton"), recorded_launches() as launches:
            output = deform_conv2d(*leaves[:4], padding=(0, 1), mask=leaves[4])
            grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
        results.append((launches, [output, *grads]))
    # Forward launches once per part, backward twice; a copied image is 1/15 of the columns, its sums another.
    assert [len(launches) for launches, _ in results] == [5 + 10, 3 + 10, 1 + 2]
    for _, part in results[:2]:
        for value, whole in zip(part, results[2][1], strict=True):
            assert_close(value, whole.double(), 60)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_statistics(backend: str, device: torch.device) -> None:
    """What a BatchNorm needs comes with the result and is differentiable, far from zero, too."""
    leaves = [value.requires_grad_() for value in per_mix_call(device)]
    exact = [value.detach().double().requires_grad_() for value in leaves]
    with use_backend(backend):
        output, mean, variance = deform_mix(*leaves, statistics=True)
    normalised = normalise(output, mean, variance)
    plain, *statistics = reference.deform_mix(*exact, statistics=True)
    expected = normalise(plain, *statistics)
    assert relative_l2(functional.batch_norm(plain, None, None, training=True), expected) < 1e-10
    assert relative_l2(mean, statistics[0]) < 1e-6
    # Values near 2000 have fp32 steps of 1e-4, a ten-thousandth of the deviation.
    assert relative_l2(variance, statistics[1]) < 2e-4
    grad = torch.randn(expected.shape, dtype=F64, generator=torch.Generator().manual_seed(1)).to(device)
    actual = torch.autograd.grad(normalised, leaves, grad.float())
    wanted = torch.autograd.grad(expected, exact, grad)
    # The bias moves every result by about 1000 standard deviations, and fp32 loses that many digits.
    assert relative_l2(normalised, expected) < 1e-3
    for mine, other in zip(actual[:3], wanted[:3], strict=True):
        assert relative_l2(mine, other) < 3e-3


def per_mix_call(device: torch.device) -> list[Tensor]:
    """A call of ``deform_mix`` whose results have a mean about 1000 times their standard deviation."""
    shapes = (2, 3, 7, 17), (2, 6, 7, 17), (4, 3, 1, 1), (4,)
    x, offset, weight, bias = (value.to(device) for value in draw_all(3, *shapes, dtype=torch.float32))
    return [x, offset * 0.3, weight, bias.abs() * 1000 + 1000]


def normalise(output: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """BatchNorm from given statistics."""
    mean, variance = mean[:, None, None], variance[:, None, None]
    return (output - mean) / (variance + 1e-5).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_variance_beside_a_mean(dtype: torch.dtype, device: torch.device) -> None:
    """Five deviations from 0: what is a sum of deviations in theory is one in the kernel, too."""
    shapes = (2, 16, 4, 4), (2, 32, 4, 4), (8, 16, 1, 1)
    x, offset, weight = (value.to(device) for value in draw_all(4, *shapes, dtype=torch.float32))
    leaves = [x.to(dtype), offset, (weight / 4).to(dtype), torch.full((8,), 3.0, device=device, dtype=dtype)]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    with use_backend("triton"):
        variance = deform_mix(*(leaf.requires_grad_() for leaf in leaves), "identity", statistics=True)[2]
    expected = deform_mix(*exact, "identity", statistics=True)[2]
    grad = torch.linspace(-1, 1, 8, device=device)
    *actual, bias = torch.autograd.grad(variance, leaves, grad)
    for mine, other in zip(actual, torch.autograd.grad(expected, exact, grad.double()), strict=False):
        # Rounding z costs five deviations' digits.
        assert relative_l2(mine, other) < 5 * tolerance(dtype, 32)
    # The exact gradient is 0; what is left is the rounding of the mean, or of the sum of 32 gradients.
    assert bias.abs().max() < 2 * torch.finfo(dtype).eps * (3 if dtype == torch.float32 else 0.5)


def test_only_a_gradient_keeps_the_value_before_the_activation(device: torch.device) -> None:
    x, offset, weight, bias = per_mix_call(device)
    with use_backend("triton"), recorded_launches() as launches:
        deform_mix(x, offset, weight, bias)
        with torch.no_grad():
            deform_mix(x.requires_grad_(), offset, weight, bias)
        deform_mix(x, offset, weight, bias)
    assert [plan.arguments["pre_ptr"] is not None for plan in launches] == [False, False, True]


# --- the public faces --------------------------------------------------------------------------------------


def test_deform_mix_activations() -> None:
    x, offset, weight, bias = draw_all(0, (1, 3, 4, 4), (1, 6, 4, 4), (2, 3, 1, 1), (2,))
    product = deform_conv2d(x, offset, weight, bias)
    for name, function in {"gelu": functional.gelu, "relu": torch.relu, "silu": functional.silu}.items():
        assert torch.equal(deform_mix(x, offset, weight, bias, name), function(product))
    assert torch.equal(deform_mix(x, offset, weight, bias, "identity"), product)


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_channels": 6, "out_channels": 4, "kernel_size": 3},
        {"in_channels": 6, "out_channels": 4, "kernel_size": (3, 2), "stride": 2, "groups": 2, "bias": False},
        {"in_channels": 6, "out_channels": 4, "kernel_size": 1, "padding": (1, 0), "dilation": 2},
    ],
)
def test_module_is_torchvisions(arguments: dict, torchvision: ModuleType) -> None:
    torch.manual_seed(0)
    ours = DeformConv2d(**arguments)
    torch.manual_seed(0)
    theirs = torchvision.ops.DeformConv2d(**arguments)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    ours.load_state_dict(theirs.state_dict())
    size = functional.conv2d(
        torch.zeros(1, 6, 7, 8), ours.weight, None, ours.stride, ours.padding, ours.dilation, ours.groups
    ).shape[2:]
    taps = ours.weight[0, 0].numel()
    input, offset, mask = draw_all(
        1, (2, 6, 7, 8), (2, 4 * taps, *size), (2, 2 * taps, *size), dtype=torch.float32
    )
    assert_close(ours(input, offset, mask), theirs(input, offset, mask).double(), 6 * taps)


def test_deform_mix_module() -> None:
    module = DeformMix(3, 2)
    assert repr(module) == "DeformMix(3, 2, activation='gelu')"
    x, offset = draw_all(0, (1, 3, 4, 4), (1, 6, 4, 4), dtype=torch.float32)
    assert torch.equal(module(x, offset), deform_mix(x, offset, module.weight, module.bias))
    with pytest.raises(ValueError, match="in_channels"):
        DeformMix(0, 2)
    with pytest.raises(ValueError, match="weight: expected shape"):
        deform_mix(x, offset, torch.zeros(2, 3, 3, 3))
    with pytest.raises(ValueError, match="out_channels"):
        DeformConv2d(4, 3, 1, groups=2)
