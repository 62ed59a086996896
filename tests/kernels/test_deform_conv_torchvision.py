"""torchvision's own test cases of ``deform_conv2d``, run on our Triton kernels."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import ModuleType

import pytest
import torch
from deform_conv_cases import Call, expected_kernels, forced_triton, gradients, kernels_of, leaves_of
from launches import recorded_launches
from torch import Tensor

from degmix_kernels import deform_conv2d
from degmix_kernels.backend import INTERPRETED
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


def check(call: Call, oracle: ModuleType, tensors: dict[str, Tensor], wanted: tuple[str, ...]) -> None:
    """Values and the wanted gradients on Triton against torchvision's op in fp64."""
    leaves = {name: value.requires_grad_(name in wanted) for name, value in tensors.items()}
    with forced_triton(), recorded_launches() as launches:
        output = deform_conv2d(**leaves, **call.geometry)
        actual = gradients(output, [leaves[name] for name in wanted], torch.ones_like(output))
    assert kernels_of(launches) == expected_kernels(call)
    exact = leaves_of({name: value.cpu() for name, value in tensors.items()}, torch.float64)
    expected = oracle.ops.deform_conv2d(**exact, **call.geometry)
    assert_close(output, expected, call.reduction)
    others = gradients(expected, [exact[name] for name in wanted], torch.ones_like(expected))
    for name, mine, other in zip(wanted, actual, others, strict=True):
        assert_close(mine, other, call.reduction, name=f"gradient of {name}")


CASES = list(product((0, 6, 33), (True, False), ("contiguous", "permuted")))
if INTERPRETED:  # 33 images take it half a minute each time, so they come once
    CASES = [case for case in CASES if case[0] < 33 or case[1:] == (True, "permuted")]


@pytest.mark.parametrize(("batch", "masked", "layout"), CASES)
def test_forward_and_backward(
    batch: int, masked: bool, layout: str, device: torch.device, torchvision: ModuleType
) -> None:
    call = replace(THEIRS, batch=batch, masked=masked)
    tensors = {name: value.to(device) for name, value in call.tensors(spread=1.0, seed=batch).items()}
    if layout == "permuted":
        tensors = {name: permuted(name, value) for name, value in tensors.items()}
        assert batch == 0 or not any(tensors[name].is_contiguous() for name in ("input", "offset"))
    check(call, torchvision, tensors, tuple(tensors))


# pytorch/vision issue 2598: a sum over 880 000 output pixels per element of the weight's gradient.
LARGE = Call(8, 9, 9, (1000, 110), (3, 3), padding=(1, 1), biased=False)


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_weight_gradient_of_a_large_map(layout: str, device: torch.device, torchvision: ModuleType) -> None:
    """At full size on a GPU; the interpreter would take hours, and gets a map of the same kind, 16 rows high.

    The reference has the full size in test_deform_conv.py.
    """
    call = replace(LARGE, batch=2, size=(16, 11)) if INTERPRETED else LARGE
    tensors = {name: value.to(device) for name, value in call.tensors(spread=1.0).items()}
    if layout == "permuted":
        tensors = {name: permuted(name, value) for name, value in tensors.items()}
    check(call, torchvision, tensors, ("weight",))
