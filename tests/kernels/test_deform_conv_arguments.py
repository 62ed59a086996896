"""Deformable convolution: what it refuses, in which words, and what it takes although it looks odd."""

from __future__ import annotations

import numpy
import pytest
import torch
from deform_conv_cases import per_channel_call
from launches import recorded_launches

from degmix_kernels import DeformConv2d, deform_conv2d, use_backend
from degmix_kernels.deform_conv import reference
from degmix_kernels.testing import assert_close

META = torch.device("meta")
NUMBERS = "expected an integer or a pair of integers"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"input": torch.nested.nested_tensor([torch.zeros(3, 5, 6)])},
            TypeError,
            "input: expected a dense tensor, got a nested tensor",
        ),
        # Channels
        ({"input": torch.zeros(2, 0, 5, 6)}, ValueError, "input: expected at least one channel"),
        ({"weight": torch.zeros(4, 2, 1, 1)}, ValueError, "weight: .*divides.* got 2 for 3 channels"),
        ({"weight": torch.zeros(4, 1, 1, 1)}, ValueError, "weight: .*divisible.* got 4 for 3 groups"),
        ({"weight": torch.zeros(4, 3, 0, 1)}, ValueError, "weight: expected no empty dimension"),
        ({"offset": torch.zeros(2, 5, 5, 6)}, ValueError, "offset: .*channels"),
        ({"offset": torch.zeros(2, 0, 5, 6)}, ValueError, "offset: .*channels"),
        ({"offset": torch.zeros(2, 4, 5, 6)}, ValueError, "offset: .*divide"),
        # Batch and size
        ({"offset": torch.zeros(1, 6, 5, 6)}, ValueError, r"offset: expected shape \(2, 6, 5, 6\), got \(1"),
        ({"padding": 1}, ValueError, r"offset: expected shape \(2, 6, 7, 8\), got \(2, 6, 5, 6\)"),
        # An empty output
        ({"weight": torch.zeros(4, 3, 9, 9)}, ValueError, "input: .*no smaller than the kernel"),
        ({"weight": torch.zeros(4, 3, 3, 3), "dilation": 3}, ValueError, "input: .*no smaller than"),
        # Geometry
        ({"stride": (1, -1)}, ValueError, r"stride: expected at least 1, got \(1, -1\)"),
        ({"stride": 2**31}, ValueError, "stride: expected at most 2147483647, got 2147483648"),
        ({"stride": ()}, TypeError, f"stride: {NUMBERS}"),
        ({"stride": (True, 1)}, TypeError, f"stride: {NUMBERS}"),
    ],
)
def test_bad_arguments(changes: dict, error: type[Exception], message: str) -> None:
    """Every one is named before anything is launched, under autocast too; test_arguments.py has more."""
    arguments = per_channel_call(torch.device("cpu")) | changes
    with use_backend("triton"), recorded_launches() as launches:
        with pytest.raises(error, match=message):
            deform_conv2d(**arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(error, match=message):
            deform_conv2d(**arguments)
    assert not launches


def test_good_arguments_launch(device: torch.device) -> None:
    """The call whose variations are refused above is a good one, and so are these."""
    given = per_channel_call(device)
    expected = reference.deform_conv2d(**given)
    one = numpy.int64(1)
    for changes in ({}, {"stride": [1, 1]}, {"stride": one, "padding": (numpy.int32(0), 0), "dilation": one}):
        with use_backend("triton"), recorded_launches() as launches:
            assert_close(deform_conv2d(**given | changes), expected, 4)
        assert len(launches) == 1


def test_autocast_takes_offsets_of_the_other_half(device: torch.device) -> None:
    arguments = per_channel_call(device)
    arguments["offset"] = arguments["offset"].half()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = deform_conv2d(**arguments)
        expected = deform_conv2d(**arguments | {"offset": arguments["offset"].float()})
    assert torch.equal(output, expected)
    assert output.dtype == torch.bfloat16


def test_shapes_without_memory() -> None:
    """Meta tensors give the output's shape, dtype and layout, as torchvision's op does."""
    given = {name: value.to(META) for name, value in per_channel_call(torch.device("cpu")).items()}
    given["input"] = given["input"].contiguous(memory_format=torch.channels_last)
    output = deform_conv2d(**given)
    assert (output.shape, output.dtype, output.device) == ((2, 4, 5, 6), torch.float32, META)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_a_map_without_pixels(device: torch.device) -> None:
    """All padding: every sample is off the map, whatever its offset."""
    offset = torch.tensor([0.0, 1.5, -1.0, torch.inf, 1e30, -2.5], device=device)[:, None, None]
    leaves = [
        torch.zeros(1, 3, 0, 5, device=device),
        offset.expand(1, 6, 2, 7).contiguous(),
        torch.ones(4, 3, 1, 1, device=device),
        torch.arange(4.0, device=device),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    for backend in ("triton", "reference"):
        with use_backend(backend):
            output = deform_conv2d(*leaves, padding=1)
        assert torch.equal(output, leaves[3].detach()[:, None, None].expand(1, 4, 2, 7))
        grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
        assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
        assert not grads[1].any()
        assert not grads[2].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels: expected at least 1, got 0"),
        ({"in_channels": 4, "out_channels": 3, "groups": 2}, ValueError, "out_channels: .*groups=2, got 3"),
        ({"groups": 3}, ValueError, "in_channels: expected a multiple of groups=3, got 4"),
        ({"groups": 0}, ValueError, "groups: expected at least 1, got 0"),
        ({"groups": True}, TypeError, "groups: expected an integer, got True"),
        ({"kernel_size": 0}, ValueError, "kernel_size: expected at least 1, got 0"),
        ({"kernel_size": (3, 3, 3)}, TypeError, f"kernel_size: {NUMBERS}"),
        ({"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
        ({"padding": -1}, ValueError, "padding: expected at least 0, got -1"),
        ({"dilation": 0}, ValueError, "dilation: expected at least 1, got 0"),
    ],
)
def test_bad_module_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeformConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 1} | arguments)
