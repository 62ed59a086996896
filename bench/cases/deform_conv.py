"""Deformable convolution on each of its paths: 3×3, few channels per offset group, an offset per channel."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from bench.cases.op import Baseline, Draw, OpCases
from bench.cases.shapes import CONVOLUTIONS, MAPS, PER_CHANNEL, SMALL_GROUPS, Convolution, Map
from bench.harness.case import DEFORMOPS, Unavailable
from degmix_kernels.activation import activate
from degmix_kernels.contract import Sample
from degmix_kernels.registry import find


def convolution(draw: Draw, shape: Convolution) -> Sample:
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


def mix(draw: Draw, shape: Map) -> Sample:
    batch, channels, height, width = shape.batch, shape.channels, shape.height, shape.width
    arguments = {
        "x": draw(batch, channels, height, width),
        "offset": draw(batch, 2 * channels, height, width, dtype=torch.float32) * shape.spread,
        "weight": draw(channels, channels, 1, 1) / math.sqrt(channels),
        "bias": draw(channels),
    }
    return Sample(arguments, max(batch * height * width, channels))


def deform_mix_of(deform_conv2d: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """DeGMix's operator of somebody's deformable convolution: an activation follows."""

    def deform_mix(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return activate(deform_conv2d(x, offset, weight, bias), "gelu")

    return deform_mix


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
FEW_CHANNELS = 8  # of an offset group: so many at most are the path of small groups


def _path(shape: Map | Convolution) -> str | None:
    """The path that a shape takes; None for maps, which are no convolution."""
    if not isinstance(shape, Convolution):
        return None
    of_group = shape.channels // shape.offset_groups
    return "per channel" if of_group == 1 else "small groups" if of_group <= FEW_CHANNELS else "general"


OPS = (
    *(
        OpCases(
            find("deform_conv2d", path),
            convolution,
            shapes,
            _baselines(mixed=False),
            takes=lambda shape, path=path: _path(shape) == path,
        )
        for path, shapes in PATHS.items()
    ),
    OpCases(find("deform_mix"), mix, MAPS, _baselines(mixed=True)),
)
