"""What several tests of deformable convolution start from: calls, their tensors, their gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from contract import draw
from torch import Tensor

from degmix_kernels import use_backend
from degmix_kernels.launch import Launch

F64 = torch.float64


def draw_all(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = F64) -> list[Tensor]:
    return [draw(*shape, seed=10 * seed + index, dtype=dtype) for index, shape in enumerate(shapes)]


@dataclass(frozen=True)
class Call:
    """One call of ``deform_conv2d`` in sizes; pairs are (vertical, horizontal).

    Attributes:
        dtype: of all tensors but the offset.
        last: names of the tensors that are channels_last.
        spread: how many pixels wide offsets are.
    """

    batch: int
    channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    masked: bool = True
    biased: bool = True
    dtype: torch.dtype = torch.float32
    offset_dtype: torch.dtype = torch.float32
    last: str = ""
    spread: float = 2.0

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def out_size(self) -> tuple[int, int]:
        def extent(axis: int) -> int:
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            return (self.size[axis] + 2 * self.padding[axis] - reach) // self.stride[axis] + 1

        return extent(0), extent(1)

    @property
    def path(self) -> str:
        """Which kernels this call is meant for, as issue and README put it."""
        if math.gcd(self.channels // self.groups, self.channels // self.offset_groups) >= 16:
            return "general"
        return "per-channel" if self.taps == 1 and self.offset_groups == self.channels else "between"

    @property
    def columns(self) -> int:
        """Elements of the column buffer that torchvision's op would allocate."""
        return self.batch * self.channels * self.taps * math.prod(self.out_size)

    @property
    def reduction(self) -> int:
        """Terms of the longest sum behind an element of the output or of a gradient."""
        pixels = math.prod(self.out_size)
        return max(self.batch * pixels, self.channels // self.groups * self.taps, self.out_channels)

    @property
    def geometry(self) -> dict[str, tuple[int, int]]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor argument → shape; bias and mask only where the call has them."""
        shapes = {
            "input": (self.batch, self.channels, *self.size),
            "offset": (self.batch, 2 * self.offset_groups * self.taps, *self.out_size),
            "weight": (self.out_channels, self.channels // self.groups, *self.kernel),
        }
        if self.biased:
            shapes["bias"] = (self.out_channels,)
        if self.masked:
            shapes["mask"] = (self.batch, self.offset_groups * self.taps, *self.out_size)
        return shapes

    def tensors(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        """Normally distributed arguments."""
        shapes = self.shapes()
        values = dict(zip(shapes, draw_all(seed, *shapes.values(), dtype=torch.float32), strict=True))
        values["offset"] *= self.spread
        return {name: value.to(dtype).to(device) for name, value in values.items()}

    def draw(self, device: torch.device) -> dict[str, Tensor | None]:
        """All arguments and "grad", the result's gradient, in the dtypes and layouts of the call."""
        values: dict[str, Tensor | None] = self.tensors(device=device)
        values["grad"] = draw(self.batch, self.out_channels, *self.out_size, seed=99).to(device)
        for name, value in values.items():
            value = value.to(self.offset_dtype if name == "offset" else self.dtype)
            last = name in self.last.split()
            values[name] = value.contiguous(memory_format=torch.channels_last) if last else value
        return {"mask": None, "bias": None} | values


def per_channel_call(device: torch.device) -> dict[str, Tensor]:
    """Arguments of a small per-channel call: 5×6 maps, 3 channels, 4 out channels."""
    return Call(2, 3, 4, (5, 6), offset_groups=3).tensors(device=device, seed=3)


# One small call for each path.
PATHS = {
    "general": Call(2, 32, 8, (4, 5), (2, 3), padding=(1, 1), offset_groups=2),
    "per-channel": Call(2, 6, 4, (5, 6), groups=2, offset_groups=6),
    "between": Call(2, 6, 4, (5, 6), (3, 2), stride=(2, 1), padding=(1, 0), groups=2, offset_groups=3),
}


@contextmanager
def forced_triton() -> Iterator[None]:
    """Force the Triton backend; a call that runs the reference all the same fails."""
    with use_backend("triton"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no Triton kernel")
        yield


def kernels_of(launches: list[Launch]) -> set[str]:
    """ "general" and "planar", the names of the folders that the launched kernels are written in."""
    return {plan.kernel.fn.__module__.split(".")[-2] for plan in launches}


def expected_kernels(call: Call) -> set[str]:
    """What ``kernels_of`` must give for the launches of a call."""
    if call.batch == 0:
        return set()
    return {"general" if call.path == "general" else "planar"}
