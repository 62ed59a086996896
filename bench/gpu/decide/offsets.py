"""The two convolutions that make the model's offsets, grouped by task: cuDNN's, or products of windows.

Of each convolution one side is narrow, with 9 or 18 maps a group, and the other wide. All three directions
are then products with the windows of the narrow side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from bench.cases.shapes import NYUD, QUICK_MAP
from bench.gpu.decide.common import BF16, FP32, LAST, TF32, multiply_fp32, product
from bench.gpu.decide.meter import Meter

DIRECTIONS = ("fwd", "grad input", "grad weight")
TAPS = 9
POSITIONS = 2 * TAPS  # maps that DeGMix's layer makes its offsets of


def rows(meter: Meter) -> None:
    """The section."""
    shape = QUICK_MAP if meter.dry else NYUD
    tasks, channels = shape.tasks, shape.channels
    # Name, maps that come in, maps that go out, groups, whether the narrow side goes in.
    for name, inner, outer, groups, narrow_in in (
        ("positions", tasks * channels, tasks * POSITIONS, tasks, False),
        ("offsets", tasks * POSITIONS, tasks * 2 * channels, 2 * tasks, True),
    ):
        draw = partial(torch.randn, device=meter.device)
        x = draw(shape.batch, inner, shape.height, shape.width)
        weight = draw(outer, inner // groups, 3, 3) / math.sqrt(TAPS * inner // groups)
        grad = draw(shape.batch, outer, shape.height, shape.width)
        if not narrow_in:
            x = x.to(BF16).float()  # as the model's maps are
        convolution(meter, name, Convolution(x, weight, grad, groups, narrow_in))


class Convolution:
    """Both ways to compute a grouped 3×3 convolution and its gradients.

    Args:
        x: (N, maps in, H, W).
        weight: (maps out, maps in / groups, 3, 3).
        grad: of the output, (N, maps out, H, W).
        groups: of the convolution.
        narrow_in: whether the narrow side goes in.
    """

    def __init__(self, x: Tensor, weight: Tensor, grad: Tensor, groups: int, narrow_in: bool) -> None:
        self.x, self.weight, self.grad, self.groups, self.narrow_in = x, weight, grad, groups, narrow_in
        self.wide, self.narrow = (grad, x) if narrow_in else (x, grad)

    def cudnn(self, direction: str, tf32: bool, layout: dict | None = None) -> Callable[[], Tensor]:
        """A step that computes one direction by PyTorch's own convolution."""
        x, weight, grad = (each.contiguous(**(layout or {})) for each in (self.x, self.weight, self.grad))

        def step() -> Tensor:
            with torch.no_grad(), cudnn_tf32(tf32):
                if direction == "fwd":
                    return functional.conv2d(x, weight, padding=1, groups=self.groups)
                return convolution_backward(direction, x, weight, grad, self.groups)

        return step

    def products(self, direction: str, multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        """A step that computes the same by products of windows."""
        # (groups, wide maps, narrow maps · taps). Windows of what comes out have their taps mirrored.
        weight = self.weight.unflatten(0, (self.groups, -1)).flatten(3)
        matrix = weight.flatten(2) if self.narrow_in else weight.flip(3).transpose(1, 2).flatten(2)
        batch = self.x.shape[0]
        every = matrix.expand(batch, *matrix.shape).flatten(0, 1)  # of every image and group

        @torch.no_grad()
        def step() -> Tensor:
            if direction == "grad weight":
                shares = multiply(self._grouped(self.wide), self._windows().mT)
                sums = shares.unflatten(0, (batch, -1)).sum(0).unflatten(2, (-1, TAPS))
                sums = sums if self.narrow_in else sums.transpose(1, 2).flip(3)
                return sums.reshape(self.weight.shape)
            if (direction == "fwd") == self.narrow_in:
                return multiply(every, self._windows()).view_as(self.wide)
            parts = multiply(every.mT, self._grouped(self.wide)).view(batch, -1, self.x[0, 0].numel())
            return functional.fold(parts, self.x.shape[2:], 3, padding=1)

        return step

    def _grouped(self, maps: Tensor) -> Tensor:
        """(N · groups, maps of a group, pixels)."""
        return maps.flatten(2).unflatten(1, (self.groups, -1)).flatten(0, 1)

    def _windows(self) -> Tensor:
        """(N · groups, narrow maps of a group · taps, pixels)."""
        windows = functional.unfold(self.narrow, 3, padding=1)
        return windows.unflatten(1, (self.groups, -1)).flatten(0, 1)

    def exact(self, direction: str) -> Tensor:
        """The first group's results in fp64, of the first image where it is by images."""
        images = slice(None) if direction == "grad weight" else slice(0, 1)
        outer, inner = self.weight.shape[0] // self.groups, self.weight.shape[1]
        part = self.x[images, :inner], self.weight[:outer], self.grad[images, :outer]
        return Convolution(*(each.double() for each in part), 1, self.narrow_in).cudnn(direction, False)()


def convolution_backward(direction: str, x: Tensor, weight: Tensor, grad: Tensor, groups: int) -> Tensor:
    """The gradient of one of both."""
    wanted = [direction == "grad input", direction == "grad weight", False]
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], groups)
    gradients = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, wanted)
    return gradients[0 if wanted[0] else 1]


@contextmanager
def cudnn_tf32(allowed: bool) -> Iterator[None]:
    """Whether cuDNN's convolutions of fp32 may run in TF32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def convolution(meter: Meter, name: str, each: Convolution) -> None:
    """Its rows."""
    flops = 2 * each.x.shape[0] * each.x[0, 0].numel() * each.weight.numel()
    multiply = {
        "fp32": partial(multiply_fp32, tf32=False),
        "tf32": partial(multiply_fp32, tf32=True),
        "bf16": lambda left, right: product(left.to(BF16), right.to(BF16)),
    }
    for direction in DIRECTIONS:
        steps = {
            "present, tf32 allowed": (each.cudnn(direction, tf32=True), TF32),
            "cuDNN, fp32": (each.cudnn(direction, tf32=False), FP32),
            "cuDNN, channels last, tf32": (each.cudnn(direction, tf32=True, layout=LAST), TF32),
        }
        for label, dtype in {"fp32": FP32, "tf32": TF32, "bf16": BF16}.items():
            steps[f"products, {label}"] = each.products(direction, multiply[label]), dtype
        expected = cache(partial(each.exact, direction))
        reduction = each.x.shape[0] * each.x[0, 0].numel() if direction == "grad weight" else TAPS * 512
        for variant, (step, dtype) in steps.items():
            meter.row(
                f"{name} {direction}", variant, step,
                expected=expected, dtype=dtype, reduction=reduction, flops=flops,
            )  # fmt: skip
