"""DeGMix's operator with offsets computed inside the kernels, against the fp64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from launches import recorded_launches
from torch import Tensor
from torch.nn import functional

from degmix_kernels import layout, use_backend
from degmix_kernels.deform_conv import (
    computed_offsets,
    computed_offsets_backward_kernels,
    computed_offsets_kernels,
    computed_offsets_plans,
    reference,
)
from degmix_kernels.deform_conv.computed_offsets import (
    deform_mix_computed_offsets,
    reference_computed_offsets,
)
from degmix_kernels.launch import Launch
from degmix_kernels.testing import assert_close, poisoned_empty

NAMES = ("x", "positions", "offset_weight", "constant_offset", "weight", "bias")


@dataclass(frozen=True)
class Case:
    """One call; ``spread`` is the size of the constant offsets in pixels."""

    channels: int = 6
    out: int = 5
    size: tuple[int, int] = (4, 5)
    batch: int = 2
    dtype: torch.dtype = torch.float32
    activation: str = "gelu"
    bias: bool = True
    last: bool = False
    spread: float = 1.0

    @property
    def reduction(self) -> int:
        return 81 + self.channels + self.out + self.batch * self.size[0] * self.size[1] * 9

    def draw(self, device: torch.device) -> dict[str, Tensor | None]:
        """The six tensors by name, and ``grad``, a gradient of the output."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        tensors = {
            "x": normal(self.batch, self.channels, *self.size).to(self.dtype),
            "positions": normal(self.batch, 18, *self.size) * 0.3,
            "offset_weight": normal(2 * self.channels, 9, 3, 3) * 0.2,
            "constant_offset": normal(1, 2 * self.channels, *self.size) * self.spread,
            "weight": normal(self.out, self.channels, 1, 1).to(self.dtype),
            "bias": normal(self.out).to(self.dtype) if self.bias else None,
            "grad": normal(self.batch, self.out, *self.size).to(self.dtype),
        }
        if self.last:
            tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
        return tensors

    def exact(self, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """Output and gradients in fp64."""
        leaves = leaf({name: None if value is None else value.double() for name, value in tensors.items()})
        output = reference_computed_offsets(**leaves, activation=self.activation)
        output.backward(tensors["grad"].double())
        return collected(output, leaves)


def leaf(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The arguments among the tensors, each a leaf of its own."""
    return {
        name: None if tensors[name] is None else tensors[name].detach().clone().requires_grad_()
        for name in NAMES
    }


def collected(output: Tensor, leaves: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {"output": output, **{name: each.grad for name, each in leaves.items() if each is not None}}


def computed(case: Case, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Output and gradients by the kernels."""
    leaves = leaf(tensors)
    with poisoned_empty(), use_backend("triton"):
        output = deform_mix_computed_offsets(**leaves, activation=case.activation)
        output.backward(tensors["grad"])
    return collected(output, leaves)


def compare(case: Case, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], case.reduction, case.dtype, name)


CASES = {
    "fp32": Case(size=(3, 3)),
    "bf16": Case(channels=36, out=20, size=(3, 2), dtype=torch.bfloat16, activation="silu"),
    "fp16, channels_last": Case(size=(3, 2), dtype=torch.float16, activation="identity", last=True),
    "no bias, channels_last": Case(bias=False, activation="relu", last=True, size=(2, 4), batch=1),
    "several blocks of channels": Case(channels=70, out=3, size=(2, 2), batch=1),
    "several blocks of out channels": Case(channels=2, out=130, size=(2, 3), batch=1),
    "several blocks of pixels": Case(channels=2, out=5, size=(3, 11), batch=1),
    "offsets far off the map": Case(channels=2, out=2, spread=5.0, size=(5, 3), batch=1),
    "one pixel": Case(channels=2, out=1, size=(1, 1), spread=0.3),
    "one row": Case(channels=2, out=1, size=(1, 6), batch=1),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, device: torch.device) -> None:
    case = CASES[name]
    tensors = case.draw(device)
    expected, actual = case.exact(tensors), computed(case, tensors)
    compare(case, actual, expected)
    assert actual["output"].dtype == case.dtype
    assert layout.is_channels_last(actual["output"]) == case.last


def test_offsets_are_those_of_the_convolution(device: torch.device) -> None:
    """Maps, window and axes are told apart: one tap at a time moves the samples of a ramp by its position."""
    height, width, channels = 6, 7, 4
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ramp = (y * 10.0 + x).expand(1, channels, height, width).to(device)
    positions = torch.rand(1, 18, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.eye(channels, device=device)[:, :, None, None]
    constant = torch.zeros(1, 2 * channels, height, width, device=device)
    for row, map_, tap in ((0, 0, 0), (3, 8, 5), (4, 2, 7), (7, 3, 4)):
        offset_weight = torch.zeros(2 * channels, 9, 3, 3, device=device)
        offset_weight.view(-1, 81)[row, 9 * map_ + tap] = 1
        with use_backend("triton"):
            output = deform_mix_computed_offsets(
                ramp, positions, offset_weight, constant, weight, activation="identity"
            )
        moved = functional.pad(positions, (1, 1, 1, 1))[0, map_ + 9 * (row // channels)]
        moved = moved[tap // 3 : tap // 3 + height, tap % 3 : tap % 3 + width]
        expected = ramp[0].clone()
        expected[row // 2] += moved * (1 if row % 2 else 10)
        inner = slice(0, height - 1), slice(0, width - 1)  # where no sample leaves the map
        torch.testing.assert_close(output[(0, ..., *inner)], expected[(..., *inner)])


@pytest.mark.parametrize("wide", [False, True])
def test_addresses_of_both_widths(wide: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed_offsets_plans, "needs_64_bit", lambda *tensors: wide)
    case = Case(channels=2, out=2, size=(2, 3))
    tensors = case.draw(device)
    with recorded_launches() as plans:
        actual = computed(case, tensors)
    compare(case, actual, case.exact(tensors))
    assert [plan.constants["INDEX_64"] for plan in plans] == [wide] * 3


@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_at_a_time(wanted: str, device: torch.device) -> None:
    case = Case(channels=2, out=2, size=(2, 3), batch=1)
    tensors = case.draw(device)
    arguments = {name: tensors[name] for name in NAMES} | {wanted: tensors[wanted].requires_grad_()}
    with recorded_launches() as plans, use_backend("triton"), poisoned_empty():
        deform_mix_computed_offsets(**arguments).backward(tensors["grad"])
    assert_close(tensors[wanted].grad, case.exact(tensors)[wanted], case.reduction)
    kernel = "backward_weight" if wanted in ("weight", "bias") else "backward_samples"
    assert [plan.kernel.__name__ for plan in plans] == ["forward", kernel]


def test_determinism(device: torch.device) -> None:
    """Integer sums: exact enough at any magnitude, and two runs agree to the last bit."""
    case = Case(channels=2, out=2, size=(2, 3))
    tensors = case.draw(device)
    torch.use_deterministic_algorithms(True)
    try:
        for magnitude in (1e-15, 1e15):
            scaled = tensors | {"grad": tensors["grad"] * magnitude}
            with recorded_launches() as plans:
                runs = [computed(case, scaled) for _ in range(2)]
            assert [plan.constants.get("FIXED_POINT") for plan in plans] == [None, True, None] * 2
            compare(case, runs[0], case.exact(scaled))
            for name, value in runs[0].items():
                assert torch.equal(value, runs[1][name]), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_scales_leave_room(device: torch.device) -> None:
    """The worst gradient there can be still fits into 62 bits, and not by much more than it must."""
    case = Case()
    tensors = case.draw(torch.device("cpu"))
    call = computed_offsets.Call.of(*(tensors[name] for name in NAMES[:5]))
    epilogue = computed_offsets.Epilogue()
    scales = computed_offsets.fixed_point_scales(call, tensors["grad"], epilogue)
    column = tensors["grad"].abs().amax() * tensors["weight"].abs().sum(0).amax()
    taps = tensors["offset_weight"].abs().view(2, -1, 9, 9).sum((1, 3)).amax()
    worst = (column * 2 * tensors["x"].abs().amax() * taps * scales[1]).log2()
    assert 50 < worst < 62
    assert computed_offsets.fixed_point_scales(call, tensors["grad"] * torch.inf, epilogue).isnan().all()


def test_undefined_values_stay_where_they_belong(device: torch.device) -> None:
    """NaN in a position, a constant, a gradient spoil exactly what they spoil in the reference."""
    case = Case(activation="identity", channels=4, out=5, size=(5, 5))
    tensors = case.draw(device)
    tensors["positions"][0, 2, 1, 1] = torch.nan
    tensors["constant_offset"][0, 5, 3, 2] = torch.nan
    tensors["constant_offset"][0, 2, 0, 0] = torch.inf
    tensors["x"][1, 3, 2, 2] = torch.nan
    tensors["grad"][1, 0, 4, 0] = torch.nan
    expected, actual = case.exact(tensors), computed(case, tensors)
    for name in ("output", "x", "positions", "constant_offset", "weight", "bias"):
        good = expected[name].isfinite()
        assert torch.equal(actual[name].isfinite(), good), name
        assert_close(actual[name][good], expected[name][good], case.reduction, name=name)


def test_batch_0(device: torch.device) -> None:
    case = Case(batch=0)
    actual = computed(case, case.draw(device))
    assert actual["output"].shape == (0, 5, 4, 5)
    for name in NAMES:
        assert not actual[name].any()


def test_autocast_and_the_reference_path(device: torch.device) -> None:
    case = Case(dtype=torch.float32, last=True)
    tensors = {name: value for name, value in case.draw(device).items() if name in NAMES}
    with torch.autocast(device.type, dtype=torch.bfloat16), use_backend("reference"):
        output = deform_mix_computed_offsets(**tensors)
    rounded = tensors | {name: tensors[name].bfloat16() for name in ("x", "weight", "bias")}
    expected = reference_computed_offsets(**{name: each.double() for name, each in rounded.items()})
    assert output.dtype == torch.bfloat16
    assert layout.is_channels_last(output)
    assert_close(output, expected, case.reduction)


def test_reference_is_deform_mix_of_a_convolution() -> None:
    case = Case()
    tensors = {
        name: value.double() for name, value in case.draw(torch.device("cpu")).items() if name in NAMES
    }
    offset = functional.conv2d(tensors["positions"], tensors["offset_weight"], padding=1, groups=2)
    offset = offset + tensors["constant_offset"]
    expected = reference.deform_mix(tensors["x"], offset, tensors["weight"], tensors["bias"])
    assert torch.equal(deform_mix_computed_offsets(**tensors), expected)


def test_no_second_derivative(device: torch.device) -> None:
    tensors = Case(channels=2, out=1, size=(2, 2), batch=1).draw(device)
    leaves = leaf(tensors)
    output = deform_mix_computed_offsets(**leaves)
    (gradient,) = torch.autograd.grad(output.sum(), leaves["positions"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_registered_op(device: torch.device) -> None:
    """Schema, fake tensors and autograd of the op that compilers see."""
    tensors = Case(channels=2, out=2, size=(2, 3), batch=1).draw(device)
    arguments = (*leaf(tensors).values(), "gelu")
    torch.library.opcheck(
        computed_offsets.computed_offsets_op.forward,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


WRONG = {
    "x: expected an even number": (ValueError, {"x": (2, 3, 4, 5)}),
    "x: expected a map": (ValueError, {"x": (2, 6, 0, 5)}),
    "positions: expected shape": (ValueError, {"positions": (2, 17, 4, 5)}),
    "positions: expected dtype": (TypeError, {"positions": torch.bfloat16}),
    "offset_weight: expected shape": (ValueError, {"offset_weight": (12, 9, 3, 1)}),
    "offset_weight: expected dtype": (TypeError, {"offset_weight": torch.float64}),
    "constant_offset: expected shape": (ValueError, {"constant_offset": (2, 12, 4, 5)}),
    "constant_offset: expected dtype": (TypeError, {"constant_offset": torch.float16}),
    "weight: expected shape": (ValueError, {"weight": (5, 6, 3, 3)}),
    "weight: expected dtype": (TypeError, {"weight": torch.float64}),
    "weight: expected no empty": (ValueError, {"weight": (0, 6, 1, 1)}),
    "bias: expected shape": (ValueError, {"bias": (4,)}),
    "bias: expected dtype": (TypeError, {"bias": torch.bfloat16}),
    "activation: expected one of": (ValueError, {"activation": "tanh"}),
    "positions: expected a tensor": (TypeError, {"positions": None}),
    "x: expected 4 dimensions": (ValueError, {"x": (2, 6, 20)}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message: str) -> None:
    error, changes = WRONG[message]
    arguments = {name: value for name, value in Case().draw(torch.device("cpu")).items() if name in NAMES}
    for name, change in changes.items():
        if isinstance(change, tuple):
            arguments[name] = torch.zeros(change)
        else:
            arguments[name] = arguments[name].to(change) if isinstance(change, torch.dtype) else change
    with recorded_launches() as plans, pytest.raises(error, match=message):
        deform_mix_computed_offsets(**arguments)
    assert not plans


def test_every_kernel_is_in_the_examples() -> None:
    plans: list[Launch] = computed_offsets_plans.plan_examples(torch.float32)
    backward = computed_offsets_backward_kernels
    kernels = (computed_offsets_kernels.forward, backward.backward_samples, backward.backward_weight)
    assert {plan.kernel for plan in plans} == set(kernels)
