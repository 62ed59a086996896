"""The input's gradient of the general ``deform_conv2d``: scattered additions, or products with tents.

A pixel has a share in a bilinear sample that falls off along both axes like a tent: max(0, 1 - distance). The
shares of a patch of the map in all samples of a tile of output pixels are a matrix, made in registers. Its
product with the columns' gradient, summed over the taps, is added to the map: once per pixel of the patch.
Most samples lie in their patch; those that do not are scattered.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.cases.deform_conv import convolution
from bench.cases.op import Draw
from bench.cases.shapes import SMALL_OFFSETS, WILD_OFFSETS, Convolution
from bench.gpu.decide.common import BF16, LAST, backward
from bench.gpu.decide.general import TAPS, ByColumns
from bench.gpu.decide.meter import Meter
from degmix_kernels import deform_conv2d
from degmix_kernels.deform_conv import reference
from degmix_kernels.deform_conv.general.kernels import corner_address, corner_weights, load_mask
from degmix_kernels.deform_conv.sampling import corners_on_map, locate, scatter
from degmix_kernels.launch import Launch, run
from degmix_kernels.maps import ceil_div
from degmix_kernels.product import multiply, precision

IMAGE = partial(Convolution, 1, 256, 100, 152)
SMALL = partial(Convolution, 1, 16, 9, 11)  # four tiles
TILE, PATCH = 8, 16  # side of a tile of output pixels, and of the patch around it
BLOCK_CHANNELS = 128  # of a program with tents
BLOCK_PIXELS = 16  # of a program that scatters


@triton.jit
def load_offsets(offset_ptr, pixel, tap, valid, pixels):
    """Of samples at a tap, (18, pixels): y and x."""
    offset_ptr += 2 * tap * pixels + pixel
    return tl.load(offset_ptr, mask=valid, other=0.0), tl.load(offset_ptr + pixels, mask=valid, other=0.0)


@triton.jit
def place(offset_y, offset_x, y, x, tap, TILE: tl.constexpr, PATCH: tl.constexpr):
    """Where samples are in the patch of their tile, and whether: not where NaN. 3×3, stride 1, padding 1."""
    MARGIN: tl.constexpr = (PATCH - TILE) // 2 - 1
    place_y = (y % TILE + MARGIN + tap // 3).to(tl.float32) + offset_y
    place_x = (x % TILE + MARGIN + tap % 3).to(tl.float32) + offset_x
    inside = (place_y >= 0) & (place_y <= PATCH - 1) & (place_x >= 0) & (place_x <= PATCH - 1)
    return place_y, place_x, inside


@triton.jit
def add_tents(
    col_ptr,  # (pixels, 9, CHANNELS), the columns' gradient
    offset_ptr,  # (18, pixels)
    mask_ptr,  # (9, pixels)
    grad_input_ptr,  # (pixels, CHANNELS), fp32, added to
    height,
    width,
    tiles_x,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    PATCH: tl.constexpr,
):
    """Of samples in the patch of their tile. One program: BLOCK_CHANNELS channels of a tile."""
    BLOCKS: tl.constexpr = CHANNELS // BLOCK_CHANNELS
    program, pixels = tl.program_id(0), height * width
    channel = program % BLOCKS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    first_y, first_x = program // BLOCKS // tiles_x * TILE, program // BLOCKS % tiles_x * TILE
    y, x = first_y + tl.arange(0, TILE * TILE) // TILE, first_x + tl.arange(0, TILE * TILE) % TILE
    valid, pixel = (y < height) & (x < width), y * width + x
    line = tl.arange(0, PATCH).to(tl.float32)[:, None]
    total = tl.zeros((PATCH * PATCH, BLOCK_CHANNELS), tl.float32)
    for tap in range(9):
        offset_y, offset_x = load_offsets(offset_ptr, pixel, tap, valid, pixels)
        place_y, place_x, inside = place(offset_y, offset_x, y, x, tap, TILE, PATCH)
        modulation = load_mask(mask_ptr, 0, 0, 1, tap, 9, pixel, valid, pixels, False)
        modulation = tl.where(inside, modulation, 0.0)
        place_y, place_x = tl.where(inside, place_y, 0.0), tl.where(inside, place_x, 0.0)
        tent_y = tl.maximum(1 - tl.abs(line - place_y[None, :]), 0.0) * modulation[None, :]
        tent_x = tl.maximum(1 - tl.abs(line - place_x[None, :]), 0.0)
        tents = tl.reshape(tent_y[:, None, :] * tent_x[None, :, :], (PATCH * PATCH, TILE * TILE))
        at = (pixel[:, None] * 9 + tap) * CHANNELS + channel
        gradient = tl.load(col_ptr + at, mask=valid[:, None], other=0.0)
        total = multiply(tents.to(gradient.dtype), gradient, total, PRECISION)
    y = first_y - (PATCH - TILE) // 2 + tl.arange(0, PATCH * PATCH) // PATCH
    x = first_x - (PATCH - TILE) // 2 + tl.arange(0, PATCH * PATCH) % PATCH
    on_map = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = (y * width + x)[:, None] * CHANNELS + channel
    tl.atomic_add(grad_input_ptr + at, total, mask=on_map[:, None], sem="relaxed")


@triton.jit
def add_corners(
    col_ptr,  # (pixels, 9, CHANNELS), the columns' gradient
    offset_ptr,  # (18, pixels)
    mask_ptr,  # (9, pixels)
    grad_input_ptr,  # (pixels, CHANNELS), fp32, added to
    height,
    width,
    CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    TILE: tl.constexpr,
    PATCH: tl.constexpr,
    OUTSIDE: tl.constexpr,  # only of samples that add_tents leaves out
):
    """One program: BLOCK_PIXELS pixels at one tap."""
    program, pixels = tl.program_id(0), height * width
    tap = program % 9
    pixel = program // 9 * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    y, x, valid = pixel // width, pixel % width, pixel < pixels
    offset_y, offset_x = load_offsets(offset_ptr, pixel, tap, valid, pixels)
    if OUTSIDE:
        _, _, inside = place(offset_y, offset_x, y, x, tap, TILE, PATCH)
        valid = valid & (inside == 0)
    low_y, low_x, fraction_y, fraction_x = locate(
        offset_y, offset_x, y - 1 + tap // 3, x - 1 + tap % 3, height, width
    )
    modulation = load_mask(mask_ptr, 0, 0, 1, tap, 9, pixel, valid, pixels, False)
    weight_00, weight_01, weight_10, weight_11 = corner_weights(fraction_y, fraction_x, modulation)
    on_00, on_01, on_10, on_11 = corners_on_map(low_y, low_x, valid, height, width)
    channel = tl.arange(0, CHANNELS)[None, :]
    at = (pixel[:, None] * 9 + tap) * CHANNELS + channel
    gradient = tl.load(col_ptr + at, mask=valid[:, None], other=0.0).to(tl.float32)
    address = corner_address(0, low_y, low_x, CHANNELS, height, width, False)[:, None] + channel
    below = address + width * CHANNELS
    scatter(grad_input_ptr, address, weight_00[:, None] * gradient, on_00[:, None], 1.0, False)
    scatter(grad_input_ptr, address + CHANNELS, weight_01[:, None] * gradient, on_01[:, None], 1.0, False)
    scatter(grad_input_ptr, below, weight_10[:, None] * gradient, on_10[:, None], 1.0, False)
    scatter(grad_input_ptr, below + CHANNELS, weight_11[:, None] * gradient, on_11[:, None], 1.0, False)


class InputGradient:
    """Of one image, from its columns' gradient.

    Args:
        arguments: of ``deform_conv2d``, input channels last.
        grad: of the output, channels last.
    """

    def __init__(self, arguments: Mapping[str, Tensor], grad: Tensor) -> None:
        self.image = ByColumns(arguments, grad)
        self.columns = self.image.rows[0] @ self.image.matrix
        self.tiles_x = ceil_div(self.image.width, TILE)
        self.tiles = ceil_div(self.image.height, TILE) * self.tiles_x
        self.flops = 2 * self.tiles * TAPS * TILE**2 * PATCH**2 * self.image.channels

    def scattered(self) -> Tensor:
        """By additions alone."""
        self.image.sums.zero_()
        self.add_corners(outside=False)
        return self.image.sums

    def by_tents(self) -> Tensor:
        """By products, and additions of what lies too far away."""
        self.image.sums.zero_()
        self.add_tents()
        self.add_corners(outside=True)
        return self.image.sums

    def add_tents(self) -> None:
        """Of what lies in the patches."""
        block = min(BLOCK_CHANNELS, self.image.channels)
        programs = self.tiles * (self.image.channels // block)
        constants = {"BLOCK_CHANNELS": block, "PRECISION": precision(self.columns.dtype)}
        self._launch(add_tents, programs, constants, 16, tiles_x=self.tiles_x)

    def add_corners(self, outside: bool) -> None:
        """Of all samples, or of those outside their patch."""
        programs = TAPS * ceil_div(self.image.pixels, BLOCK_PIXELS)
        self._launch(add_corners, programs, {"BLOCK_PIXELS": BLOCK_PIXELS, "OUTSIDE": outside}, 8)

    def _launch(self, kernel: Any, programs: int, constants: dict[str, Any], warps: int, **own: int) -> None:
        image = self.image
        arguments = {
            "col_ptr": self.columns, "offset_ptr": image.offset, "mask_ptr": image.mask,
            "grad_input_ptr": image.sums, "height": image.height, "width": image.width,
        }  # fmt: skip
        constants |= {"CHANNELS": image.channels, "TILE": TILE, "PATCH": PATCH}
        run(Launch(kernel, programs, arguments | own, constants, num_warps=warps), image.input.device)


def rows(meter: Meter) -> None:
    """The section."""
    for spread in (SMALL_OFFSETS, WILD_OFFSETS):
        shape = (SMALL if meter.dry else IMAGE)(spread)
        arguments = convolution(Draw(meter.device, BF16), shape).arguments
        arguments["input"] = arguments["input"].contiguous(**LAST)
        grad = torch.randn_like(arguments["input"])
        exact = backward(reference.deform_conv2d, arguments, ("input",), [grad], torch.float64)
        checked = {"expected": cache(exact)}
        name, step = f"3x3 bwd, an image, to input, sigma {spread:.0f}", InputGradient(arguments, grad)
        meter.row(name, "present, input", backward(deform_conv2d, arguments, ("input",), [grad]), **checked)
        meter.row(name, "from columns, scattered", step.scattered, **checked)
        meter.row(name, "from columns, tents", step.by_tents, **checked)
        meter.row(name, "tents: inside the patches", step.add_tents, flops=step.flops)
        meter.row(name, "tents: outside", partial(step.add_corners, outside=True))
