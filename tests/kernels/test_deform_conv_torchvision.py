"""torchvision's own test cases of ``deform_conv2d``, run on our Triton kernels and on the reference."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from contract import leaves_of, result_and_gradients
from deform_conv_cases import F64, Call, expected_kernels, forced_triton, kernels_of
from launches import recorded_launches
from torch import Tensor

from degmix_kernels import deform_conv2d, use_backend
from degmix_kernels.backend import INTERPRETED
from degmix_kernels.maps import ceil_div
from degmix_kernels.testing import assert_close

# 6 → 2 channels, all parameters different on the two axes.
THEIRS = Call(
    0, 6, 2, (5, 4), (3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 1), groups=2, offset_groups=3
)
# As torchvision's tests permute them: no layout that has a name. The third is nearly channels_last.
PERMUTATIONS = {
    "input": (0, 1, 3, 2),
    "offset": (1, 3, 0, 2),
    "mask": (1, 3, 0, 2),
    "weight": (3, 2, 0, 1),
}


def permuted(name: str, tensor: Tensor) -> Tensor:
    """The same values, laid out in the order of the permuted axes."""
    if name not in PERMUTATIONS:
        return tensor
    order = PERMUTATIONS[name]
    inverse = sorted(range(4), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)


BACKENDS = {"triton": torch.float32, "reference": F64}


def check(
    call: Call,
    oracle: ModuleType,
    layout: str,
    device: torch.device,
    backend: str,
    wanted: tuple[str, ...] | None = None,
) -> None:
    """Values and the wanted gradients, or all, on a backend against torchvision's op in fp64."""
    tensors = call.tensors(call.dtype, device, seed=call.batch, spread=1.0)
    if layout == "permuted":
        tensors = {name: permuted(name, value) for name, value in tensors.items()}
        assert call.batch == 0 or not any(tensors[name].is_contiguous() for name in ("input", "offset"))
    on_triton = backend == "triton"
    with forced_triton() if on_triton else use_backend(backend), recorded_launches() as launches:
        ours = partial(deform_conv2d, **call.geometry)
        actual = result_and_gradients(ours, leaves_of(tensors), wanted=wanted)
    assert kernels_of(launches) == (expected_kernels(call) if on_triton else set())
    exact = leaves_of({name: value.cpu() for name, value in tensors.items()}, F64)
    theirs = partial(oracle.ops.deform_conv2d, **call.geometry)
    for name, expected in result_and_gradients(theirs, exact, wanted=wanted).items():
        assert_close(actual[name], expected, call.reduction, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("masked", "layout"), [(True, "permuted"), (False, "contiguous")])
@pytest.mark.parametrize("batch", [0, 6, 33])
def test_forward_and_backward(
    batch: int, masked: bool, layout: str, backend: str, device: torch.device, torchvision: ModuleType
) -> None:
    if INTERPRETED and backend == "triton":  # which takes minutes for 33 images
        batch = ceil_div(batch, 16)
    call = replace(THEIRS, batch=batch, masked=masked, dtype=BACKENDS[backend])
    check(call, torchvision, layout, device, backend)


# pytorch/vision issue 2598: a sum over 880 000 output pixels per element of the weight's gradient.
LARGE = Call(8, 9, 9, (1000, 110), (3, 3), padding=(1, 1), biased=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_gradient_of_a_large_map(backend: str, device: torch.device, torchvision: ModuleType) -> None:
    """At full size on a GPU; the interpreter would take hours, and gets a map of the same kind, 5 rows high.

    The reference takes the full map, and one tap and out channel.
    """
    call = replace(LARGE, batch=2, size=(5, 11)) if INTERPRETED else LARGE
    if backend == "reference":
        call = replace(LARGE, out_channels=1, kernel=(1, 1), padding=(0, 0))
    check(call, torchvision, "permuted", device, backend, ("weight",))
