"""Deformable convolution on each of its paths: 3×3, few channels per offset group, an offset per channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.cases import DEFORMOPS, Baseline, Case, Draw, Unavailable, op_case
from bench.shapes import CONVOLUTIONS, MAPS, PER_CHANNEL, SMALL_GROUPS, SMALL_OFFSETS, Convolution, Map
from degmix_kernels.activation import activate
from degmix_kernels.contract import Cost, Op, Sample
from degmix_kernels.deform_conv.computed_offsets import (
    deform_mix_computed_offsets,
    reference_computed_offsets,
)
from degmix_kernels.deform_conv.op import deform_mix
from degmix_kernels.registry import find

FAMILY = "deform_conv"
POSITIONS = 18  # maps that DeGMix's operator makes its offsets of
IN_THE_KERNEL = "offsets in the kernel"


def convolution(shape: Convolution) -> Callable[[Draw], Sample]:
    def sample(draw: Draw) -> Sample:
        batch, channels, height, width = shape.batch, shape.channels, shape.height, shape.width
        taps, points = shape.kernel**2, shape.offset_groups * shape.kernel**2
        arguments = {
            "input": draw(batch, channels, height, width),
            # Offsets are fp32 in every dtype: bf16 has no room for a pixel coordinate.
            "offset": draw(batch, 2 * points, height, width, dtype=torch.float32) * shape.spread,
            "weight": draw(channels, channels, shape.kernel, shape.kernel) / math.sqrt(taps * channels),
            "bias": draw(channels),
            "padding": shape.kernel // 2,
            "mask": draw(batch, points, height, width).sigmoid(),
        }
        return Sample(arguments, max(batch * height * width, taps * channels))

    return sample


def mix(shape: Map) -> Callable[[Draw], Sample]:
    def sample(draw: Draw) -> Sample:
        batch, channels, height, width = shape.batch, shape.channels, shape.height, shape.width
        arguments = {
            "x": draw(batch, channels, height, width),
            "offset": draw(batch, 2 * channels, height, width, dtype=torch.float32) * SMALL_OFFSETS,
            "weight": draw(channels, channels, 1, 1) / math.sqrt(channels),
            "bias": draw(channels),
        }
        return Sample(arguments, max(batch * height * width, channels))

    return sample


def deform_mix_of(deform_conv2d: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """DeGMix's operator of somebody's deformable convolution: an activation follows."""

    def deform_mix(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return activate(deform_conv2d(x, offset, weight, bias), "gelu")

    return deform_mix


def _mix_of_positions(shape: Map) -> Callable[[Draw], Sample]:
    def sample(draw: Draw) -> Sample:
        batch, channels, height, width = shape.batch, shape.channels, shape.height, shape.width
        maps, taps = POSITIONS // 2, 9  # of each group; of a window
        single = {"dtype": torch.float32}
        arguments = {
            "x": draw(batch, channels, height, width),
            "positions": draw(batch, POSITIONS, height, width, **single),
            "offset_weight": draw(2 * channels, maps, 3, 3, **single) / math.sqrt(maps * taps),
            "constant_offset": draw(1, 2 * channels, height, width, **single) * SMALL_OFFSETS,
            "weight": draw(channels, channels, 1, 1) / math.sqrt(channels),
            "bias": draw(channels),
        }
        return Sample(arguments, batch * height * width * taps + maps * taps + 2 * channels)

    return sample


def _deform_mix_of_positions(
    x: Tensor, positions: Tensor, offset_weight: Tensor, constant_offset: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Offsets by PyTorch's convolution, then our operator."""
    offset = functional.conv2d(positions, offset_weight, padding=1, groups=2) + constant_offset
    return deform_mix(x, offset, weight, bias)


def _op_of_positions() -> Op:
    """``deform_mix`` from the maps that its offsets are made of."""
    op = find("deform_mix")

    def products(arguments: Mapping[str, Any]) -> int:
        pixels = math.prod(arguments["x"].shape) // arguments["x"].shape[1]
        return 2 * pixels * (arguments["offset_weight"].numel() + arguments["weight"].numel())

    tensors = ("x", "positions", "offset_weight", "constant_offset", "weight", "bias")
    return replace(
        op,
        function=_deform_mix_of_positions,
        reference=reference_computed_offsets,
        differentiable=tensors,
        cost=Cost(lambda arguments: arguments["x"].shape, products, 2, tensors),
        variant="from positions",
    )


def load_torchvision(device: torch.device) -> Callable[..., Tensor]:
    """torchvision's operator.

    Raises:
        Unavailable: if it is not installed or does not load.
    """
    # RuntimeError: a torchvision that was built for another torch.
    try:
        from torchvision.ops import deform_conv2d
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise Unavailable(f"torchvision's operator does not load: {error}") from error
    return deform_conv2d


def _deformops(device: torch.device) -> Callable[..., Tensor]:
    """deformops' drop-in for torchvision's function; it copies its operands channels last and back."""
    try:
        function = import_module("deformops.integrations.torchvision").deform_conv2d
    except ImportError:
        raise Unavailable("deformops is not installed") from None
    if device.type != "cuda":
        raise Unavailable("needs a GPU")
    return function


def _baselines(mixed: bool) -> tuple[Baseline, ...]:
    """torchvision's operator in the dtypes that it has, and deformops'."""

    def of(load: Callable[[torch.device], Callable[..., Tensor]]) -> Callable[..., Callable[..., Tensor]]:
        return (lambda device: deform_mix_of(load(device))) if mixed else load

    return (
        Baseline("torchvision fp32", of(load_torchvision), torch.float32),
        Baseline("torchvision fp16", of(load_torchvision), torch.float16),
        Baseline(DEFORMOPS, of(_deformops)),
    )


PATHS = {"general": CONVOLUTIONS, "per channel": PER_CHANNEL, "small groups": SMALL_GROUPS}
CASES: tuple[Case, ...] = (
    *(
        op_case(FAMILY, find("deform_conv2d", path), shape.name, convolution(shape), _baselines(mixed=False))
        for path, shapes in PATHS.items()
        for shape in shapes
    ),
    *(op_case(FAMILY, find("deform_mix"), shape.name, mix(shape), _baselines(mixed=True)) for shape in MAPS),
    # Should the model compute its offsets in the kernel? See degmix_kernels/deform_conv/COMPUTED_OFFSETS.md.
    *(
        op_case(
            FAMILY,
            _op_of_positions(),
            shape.name,
            _mix_of_positions(shape),
            (Baseline(IN_THE_KERNEL, lambda device: deform_mix_computed_offsets),),
        )
        for shape in MAPS
    ),
)
