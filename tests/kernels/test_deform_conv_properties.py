"""Deformable convolution on Triton at random: values and all gradients against torchvision and the reference.

Every example draws a whole call: sizes, groups, geometry, dtypes, layouts, offsets in awkward places.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from contract import deterministic_algorithms, leaves_of, result_and_gradients
from deform_conv_cases import Call, expected_kernels, forced_triton, kernels_of
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from launches import recorded_launches
from torch import Tensor

from degmix_kernels import deform_conv2d, maps
from degmix_kernels.deform_conv import reference
from degmix_kernels.testing import poisoned_empty, tolerance

# Examples of each path: in the plain run, and with --full.
EXAMPLES = {"general": (6, 400), "per-channel": (8, 400), "between": (8, 400)}
# A share of them each.
DTYPES = {torch.float32: 1 / 2, torch.bfloat16: 1 / 4, torch.float16: 1 / 4}

# An offset; or, as ("first" | "last", distance), a coordinate, from the first pixel or the one past the last.
PLACES = st.one_of(
    st.sampled_from([0.0, -1.0, 1.0, -0.5, 2.0, 1e-7, -1e-7, 3e4, -3e4, 1e30, -1e30, math.inf, -math.inf]),
    st.tuples(st.just("first"), st.sampled_from([-2.0, -1.0, -0.5, 0.0])),
    st.tuples(st.just("last"), st.sampled_from([-1.0, -0.5, 0.0, 1.0])),
)
Place = float | tuple[str, float]


@dataclass(frozen=True)
class Example:
    """One call and the properties of its tensors."""

    call: Call
    layouts: dict[str, str]  # of arguments by name, "grad" for the gradient of the output
    whole: bool  # all offsets are integers
    places: list[Place]
    undefined: int  # how many offsets are NaN
    deterministic: bool
    seed: int


# The interpreter's time grows with taps and blocks of channels, so few calls have many of both.
KERNELS = st.sampled_from([(1, 2), (2, 1), (2, 2), (1, 1), (3, 1), (1, 3), (2, 3), (3, 3)])
GROUPS = st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (2, 3)])  # and offset groups
MAPS = ("input", "offset", "mask", "weight", "grad")
LAYOUTS = ("contiguous", "channels_last", "permuted")  # the last one has no name in PyTorch
STEPS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def calls(draw: Callable, path: str) -> Call:
    """A call of the given path; groups and offset groups know nothing of each other."""
    stride, dilation, padding = draw(STEPS), draw(STEPS), draw(STEPS)
    padding = (padding[0] - 1, padding[1] - 1)
    kernel = (1, 1) if path == "per-channel" else draw(KERNELS)
    if path == "general":
        segment = draw(st.integers(16, 21) | st.just(32))  # channels that share group and offset group
        groups, offset_groups = draw(GROUPS)
        channels = segment * math.lcm(groups, offset_groups)
    elif path == "per-channel":
        channels = offset_groups = draw(st.integers(1, 9))
        groups = draw(st.sampled_from([each for each in range(1, channels + 1) if channels % each == 0]))
    else:
        groups, offset_groups = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        channels = draw(st.integers(1, 15)) * math.lcm(groups, offset_groups)
        if draw(st.integers(0, 2)) == 2:
            groups = channels  # depthwise, with offset groups of any size
    least = [dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis] for axis in (0, 1)]
    batch = draw(st.sampled_from([2, 1, 3]))
    if draw(st.integers(0, 9)) == 6:  # hypothesis is fond of first and last values
        batch = 0
    call = Call(
        batch=1,
        channels=channels,
        out_channels=groups * draw(st.integers(1, 5) if groups < 8 else st.integers(1, 2)),
        size=tuple(max(draw(st.integers(1, 6)), extent) for extent in least),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        masked=draw(st.booleans()),
        biased=draw(st.booleans()),
        spread=3.0,
    )
    assume(call.path == path and tiles(call) <= 12)
    return replace(call, batch=min(batch, 12 // tiles(call)))


def tiles(call: Call) -> int:
    """About how many tiles of columns the interpreter computes."""
    groups = 1 if call.path == "per-channel" else max(call.offset_groups, call.groups, call.channels // 16)
    return call.batch * -(-math.prod(call.out_size) // 32) * call.taps * groups


@st.composite
def examples(draw: Callable, path: str, dtype: torch.dtype) -> Example:
    return Example(
        call=replace(
            draw(calls(path)), dtype=dtype, offset_dtype=draw(st.sampled_from([torch.float32, dtype]))
        ),
        layouts=draw(st.fixed_dictionaries(dict.fromkeys(MAPS, st.sampled_from(LAYOUTS)))),
        whole=draw(st.integers(0, 4)) == 0,
        places=draw(st.lists(PLACES, max_size=12)),
        undefined=draw(st.sampled_from([0, 0, 0, 1, 2])),
        deterministic=draw(st.integers(0, 3)) == 0,
        seed=draw(st.integers(0, 99)),
    )


def base_coordinates(call: Call) -> tuple[Tensor, Tensor]:
    """Coordinate of every offset's tap before the offset, and extent of its axis; shaped as one image's."""
    axes = []
    for axis in (0, 1):
        output = torch.arange(call.out_size[axis]) * call.stride[axis] - call.padding[axis]
        tap = torch.arange(call.kernel[axis]) * call.dilation[axis]
        axes.append((tap[:, None] + output).double())  # (kernel, out_size) of this axis
    (kernel_y, kernel_x), size = call.kernel, call.out_size
    y = axes[0][:, None, :, None].expand(kernel_y, kernel_x, *size)
    x = axes[1][None, :, None, :].expand(kernel_y, kernel_x, *size)
    base = torch.stack([y, x], 2).reshape(2 * call.taps, *size).repeat(call.offset_groups, 1, 1)
    extent = torch.tensor(call.size, dtype=base.dtype).repeat(call.offset_groups * call.taps)
    return base, extent[:, None, None].expand(base.shape)


def tensors_of(example: Example) -> dict[str, Tensor]:
    """The call's arguments, and "grad", with offsets and layouts as the example wants them."""
    call, generator = example.call, torch.Generator().manual_seed(example.seed)
    tensors = call.tensors(seed=example.seed)
    offset = tensors["offset"].round() if example.whole else tensors["offset"]
    base, extent = (each.expand(offset.shape) for each in base_coordinates(call))
    spots = torch.randperm(offset.numel(), generator=generator).tolist()
    for place in example.places[: len(spots)]:
        spot = spots.pop()
        if isinstance(place, tuple):
            start = {"first": 0.0, "last": extent.reshape(-1)[spot].item()}[place[0]]
            place = start + place[1] - base.reshape(-1)[spot].item()
        offset.view(-1)[spot] = place
    for spot in spots[: example.undefined]:
        offset.view(-1)[spot] = math.nan
    tensors["offset"] = offset
    grad_shape = (call.batch, call.out_channels, *call.out_size)
    tensors["grad"] = torch.randn(grad_shape, generator=generator)
    for name in tensors:
        tensors[name] = tensors[name].to(call.offset_dtype if name == "offset" else call.dtype)
        if example.layouts.get(name) == "channels_last":
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
        elif example.layouts.get(name) == "permuted":
            tensors[name] = tensors[name].permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)
    return tensors


def usual_size(call: Call, tensors: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Norm that output and gradients would have if the terms of their sums had random signs.

    Independent terms add up in squares, so these are the results for squared arguments. A single element
    may be small because its terms happen to cancel; its error then is not.
    """
    squares = {name: value if name == "offset" else value.square() for name, value in tensors.items()}
    squares.setdefault("mask", torch.ones_like(tensors["offset"][:, ::2]))
    sizes = result_and_gradients(
        partial(reference.deform_conv2d, **call.geometry), leaves_of(squares), grad.square()
    )
    # A coordinate's gradient has the terms of the mask's, times the mask, but for differences of pixels.
    sizes["offset"] = sizes["mask"] * squares["mask"]
    return {name: value.nan_to_num().sum().sqrt().item() for name, value in sizes.items()}


def compare(
    actual: dict[str, Tensor], expected: dict[str, Tensor], sizes: dict[str, float], call: Call, by: str
) -> None:
    """Same NaNs, and the rest within the derived tolerance."""
    for name, value in actual.items():
        wanted = expected[name]
        assert value.shape == wanted.shape, f"{name} by {by}: {value.shape}, expected {wanted.shape}"
        assert torch.equal(value.isnan().cpu(), wanted.isnan()), f"{name} by {by}: NaN in other places"
        error = (value.double().cpu() - wanted).nan_to_num(nan=0.0).norm().item()
        size = max(wanted.nan_to_num(nan=0.0).norm().item(), sizes[name])
        limit = tolerance(call.dtype, call.reduction) * size
        assert error <= limit, f"{name} by {by}: error {error:.3e}, at most {limit:.3e} of {size:.3e}"


@pytest.fixture(scope="module")
def oracles(request: pytest.FixtureRequest) -> dict[str, Callable]:
    """The reference, and torchvision's op where it loads."""
    try:
        torchvision = request.getfixturevalue("torchvision")
    except pytest.skip.Exception as reason:
        warnings.warn(f"compared with the reference only: {reason}", stacklevel=1)
        return {"reference": reference.deform_conv2d}
    return {"reference": reference.deform_conv2d, "torchvision": torchvision.ops.deform_conv2d}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("path", EXAMPLES)
def test_random_calls(
    path: str, device: torch.device, oracles: dict[str, Callable], pytestconfig: pytest.Config
) -> None:
    met, wanted = Counter(), EXAMPLES[path][pytestconfig.getoption("--full")]

    def check(example: Example) -> None:
        call, tensors = example.call, tensors_of(example)
        grad = tensors.pop("grad")
        leaves = {name: value.to(device).requires_grad_() for name, value in leaves_of(tensors).items()}
        settings = deterministic_algorithms(example.deterministic)
        with settings, forced_triton(), recorded_launches() as launches, poisoned_empty():
            actual = result_and_gradients(partial(deform_conv2d, **call.geometry), leaves, grad)
        assert kernels_of(launches) == expected_kernels(call)
        assert all(actual[name].dtype == value.dtype for name, value in tensors.items())
        if maps.is_channels_last(tensors["input"]):
            assert actual["output"].is_contiguous(memory_format=torch.channels_last)
        else:
            assert actual["output"].is_contiguous()

        exact = leaves_of(tensors, torch.float64)
        sizes = usual_size(call, {name: value.detach() for name, value in exact.items()}, grad.double())
        for by, oracle in oracles.items():
            if by == "torchvision":
                if exact["offset"].isnan().any():
                    continue  # it crashes
                # It computes with infinite fractions; far outside means the same. It also rounds coordinates,
                # here in fp64, so it needs offsets that are not too close to integers; ours rounds none.
                far = exact["offset"].detach().nan_to_num(posinf=1e30, neginf=-1e30)
                exact = exact | {"offset": far.requires_grad_()}
            expected = result_and_gradients(partial(oracle, **call.geometry), exact, grad)
            compare(actual, expected, sizes, call, by)
        met["images"] += call.batch > 0
        met["undefined"] += bool(tensors["offset"].isnan().any())
        met["deterministic"] += example.deterministic

    for number, (dtype, share) in enumerate(DTYPES.items()):
        # No shrinking: it would take the interpreter an hour. The example that fails is printed as it is.
        chosen = settings(
            max_examples=math.ceil(share * wanted),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
        )
        seed(number)(chosen(given(example=examples(path, dtype))(check)))()
    # What the examples are meant to cover, they did.
    assert met["images"] >= 0.6 * wanted
    assert met["undefined"]
    assert met["deterministic"]
