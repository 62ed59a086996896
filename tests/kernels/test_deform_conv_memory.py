"""Memory of ``deform_conv2d`` on Triton: what is kept for the backward pass, and what is needed on the way.

Launches allocate nothing, so they are left out and fake tensors will do: nothing here needs memory or a GPU.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from allocations import Allocations, describe
from contract import deterministic_algorithms
from deform_conv_cases import PATHS, Call, expected_kernels, forced_triton, kernels_of
from launches import recorded_launches
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from degmix_kernels import deform_conv2d

LAYOUTS = ("contiguous", "channels_last", "strided")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A 4-D tensor in a layout; strided: every other element of its last axis, as a slice leaves it."""
    if tensor.dim() != 4 or layout == "contiguous":
        return tensor
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    return torch.stack([tensor, tensor], -1)[..., 0]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REALISTIC = {
    "3x3, 256 channels, 56², N=32": Call(32, 256, 256, (56, 56), (3, 3), padding=(1, 1)),
    "3x3, 256 channels, 100×168, N=8": Call(8, 256, 256, (100, 168), (3, 3), padding=(1, 1)),
    "3x3, 64 channels in 16 offset groups, 180×320, N=8": Call(
        8, 64, 64, (180, 320), (3, 3), padding=(1, 1), offset_groups=16
    ),
    "3x3, 256 channels, depthwise, 56², N=32": Call(
        32, 256, 256, (56, 56), (3, 3), padding=(1, 1), groups=256, masked=False
    ),
    "per channel, NYUD, N=8": Call(8, 256, 256, (107, 140), offset_groups=256, masked=False),
}


def allowance(call: Call, dtype: torch.dtype, deterministic: bool, layout: str) -> int:
    """Bytes that temporaries may take: a twentieth of the column buffer, or what one image needs if more.

    One image needs its input in another layout, and a sum for each of its elements, fp32 or 64-bit integers;
    where they are strided, dense copies of its other tensors; the weight in another layout, its sums; and
    the scale of the integers.
    """
    image = call.channels * math.prod(call.size)
    weight = call.out_channels * call.channels // call.groups * call.taps
    needs = image * (dtype.itemsize + (8 if deterministic else 4)) + weight * (dtype.itemsize + 4) + 16
    if layout == "strided":
        maps = 3 * call.offset_groups * call.taps + call.out_channels  # offset, mask and gradient
        needs += maps * math.prod(call.out_size) * dtype.itemsize
    return max(call.columns * dtype.itemsize // 20, needs)


@pytest.mark.parametrize(
    ("layout", "deterministic"),
    [*((layout, False) for layout in LAYOUTS), ("contiguous", True)],
    ids=[*LAYOUTS, "deterministic"],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REALISTIC)
def test_temporaries_are_small(
    name: str, dtype: str, layout: str, deterministic: bool, device: torch.device
) -> None:
    """At most 5 % of the column buffer, or what one image needs; a failure names what was alive."""
    call, kind = REALISTIC[name], DTYPES[dtype]
    limit, whole = allowance(call, kind, deterministic, layout), call.columns * kind.itemsize
    peaks = {}
    settings = deterministic_algorithms(deterministic)
    with settings, FakeTensorMode(), device, forced_triton(), recorded_launches(execute=False) as launches:
        shapes = call.shapes() | {"grad": (call.batch, call.out_channels, *call.out_size)}
        tensors = {key: laid_out(torch.empty(shape, dtype=kind), layout) for key, shape in shapes.items()}
        grad = tensors.pop("grad")
        leaves = {key: value.requires_grad_() for key, value in tensors.items()}
        with Allocations(*leaves.values()) as forward:
            output = deform_conv2d(**leaves, **call.geometry)
        peaks["forward"] = forward.peak([output])
        kept = forward.alive() - output.nbytes
        with Allocations(output, grad, *leaves.values()) as backward:
            gradients = torch.autograd.grad(output, list(leaves.values()), grad)
        peaks["backward"] = backward.peak(gradients)
    assert kernels_of(launches) == expected_kernels(call)
    assert kept == 0, f"{kept} bytes stay allocated after the forward pass"
    for phase, (size, alive) in peaks.items():
        words = describe(size, whole, alive)
        assert size <= limit, f"{phase}: temporaries take {words}\nat most {limit / 2**20:.1f} MiB"


@pytest.mark.parametrize("path", PATHS)
def test_every_share_of_the_weight_gradient_has_pixels(path: str, device: torch.device) -> None:
    """A call of few pixels is no occasion for hundreds of programs, each with partial sums of its own."""
    call = replace(PATHS[path], kernel=(1, 1), groups=1, size=(9, 8), padding=(0, 0), stride=(1, 1))
    leaves = {name: value.to(device).requires_grad_() for name, value in call.tensors().items()}
    with forced_triton(), recorded_launches(execute=False) as launches:
        output = deform_conv2d(**leaves, **call.geometry)
        torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))
    programs = sum(plan.programs for plan in launches if plan.kernel.fn.__name__ == "backward_weight")
    tiles = -(-call.channels // 16)
    assert 0 < programs <= tiles * call.batch * -(-math.prod(call.out_size) // 16)
