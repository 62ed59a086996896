"""Matrix products of maps and tokens: what ``channel_mix`` and ``linear_norm`` share.

A map is (images, channels, pixels) in memory, or LAST: (pixels of all images, channels), as tokens are.
Results are computed as (out channels, pixels) tiles in either order, so that one epilogue serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from degmix_kernels import backend
from degmix_kernels.launch import needs_64_bit
from degmix_kernels.maps import Sizes, block_of, ceil_div, largest_unit


@triton.jit
def multiply(left, right, accumulator, PRECISION: tl.constexpr):
    """accumulator + left · right in fp32. PRECISION: "ieee" or "tf32" for fp32 operands, or "interpreter"."""
    if PRECISION == "interpreter":  # which would multiply the bit patterns of bf16 as integers
        return tl.dot(left.to(tl.float32), right.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(left, right, accumulator, input_precision=PRECISION)


@triton.jit
def tile_of(
    inner,
    out_channels,
    pixels,
    out_blocks,
    pixel_blocks,
    groups,
    INNER_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    PIXEL_UNIT: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Sizes in elements, and this program's image, group and starts of its tile.

    Programs that read the same pixels follow each other.
    """
    program = tl.program_id(0)
    if INDEX_64:
        program = program.to(tl.int64)
    out_start = program % out_blocks * BLOCK_OUT
    program //= out_blocks
    group = program % groups
    program //= groups
    pixel_start = program % pixel_blocks * BLOCK_PIXELS
    image = program // pixel_blocks
    return (
        inner * INNER_UNIT, out_channels * OUT_UNIT, pixels * PIXEL_UNIT, image, group, out_start, pixel_start
    )  # fmt: skip


@triton.jit
def product_tile(
    x_ptr,  # of the image and group
    weight_ptr,  # (out channels, inner) of the group
    out,  # (BLOCK_OUT,)
    out_valid,
    pixel,  # (BLOCK_PIXELS,)
    pixel_valid,
    inner_units,  # a kernel argument, for a loop to end at
    channels,  # of x, in all groups
    pixels,
    UNIT: tl.constexpr,  # channels of an inner unit
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """weight · x of one tile, (BLOCK_OUT, BLOCK_PIXELS) in fp32."""
    total = tl.zeros((out.shape[0], pixel.shape[0]), tl.float32)
    inner = inner_units * UNIT
    for start in range(0, inner_units, BLOCK_INNER // UNIT):
        index = start * UNIT + tl.arange(0, BLOCK_INNER)
        index_valid = index < inner
        weight = tl.load(
            weight_ptr + out[:, None] * inner + index[None, :],
            mask=out_valid[:, None] & index_valid[None, :],
            other=0.0,
        )
        if LAST:
            address = pixel[None, :] * channels + index[:, None]
        else:
            address = index[:, None] * pixels + pixel[None, :]
        x = tl.load(x_ptr + address, mask=index_valid[:, None] & pixel_valid[None, :], other=0.0)
        total = multiply(weight, x, total, PRECISION)
    return total


@dataclass(frozen=True)
class Product:
    """Sizes of ``weight · x`` for a dense x.

    Attributes:
        x: (N, groups·inner, H, W), (tokens, groups·inner) or (images, tokens, groups·inner), dense.
        weight: (groups·out_channels, inner), dense.
        out_block: out channels of a tile.
        pixel_block: pixels of a tile.
        inner_block: channels of x that are multiplied at a time, at most.
    """

    x: Tensor
    weight: Tensor
    out_block: int
    pixel_block: int
    inner_block: int

    @property
    def groups(self) -> int:
        """Groups of channels that share nothing."""
        return self.sizes.channels // self.weight.shape[1]

    @property
    def out_channels(self) -> int:
        """Output channels of one group."""
        return self.weight.shape[0] // self.groups

    @property
    def sizes(self) -> Sizes:
        """Sizes of x."""
        return Sizes.of(self.x)

    @property
    def pixel_blocks(self) -> int:
        """Tiles of one image's pixels."""
        return ceil_div(self.sizes.pixels, self.pixel_block)

    @property
    def programs(self) -> int:
        """One per tile."""
        out_blocks = ceil_div(self.out_channels, self.out_block)
        return self.sizes.images * self.pixel_blocks * self.groups * out_blocks

    def arguments(self) -> dict[str, int]:
        """Run-time sizes, in units where the compiler should know a divisor."""
        inner, pixels = self.weight.shape[1], self.sizes.pixels
        return {
            "inner": inner // largest_unit(inner),
            "out_channels": self.out_channels // largest_unit(self.out_channels),
            "pixels": pixels // self._pixel_unit,
            "out_blocks": ceil_div(self.out_channels, self.out_block),
            "pixel_blocks": self.pixel_blocks,
            "groups": self.groups,
        }

    @property
    def _pixel_unit(self) -> int:
        return 1 if self.sizes.last else largest_unit(self.sizes.pixels)

    def constants(self, *tensors: Tensor | None) -> dict[str, Any]:
        """Compile-time arguments; the tensors decide whether addresses need 64 bits."""
        inner = self.weight.shape[1]
        return {
            "INNER_UNIT": largest_unit(inner),
            "OUT_UNIT": largest_unit(self.out_channels),
            "PIXEL_UNIT": self._pixel_unit,
            "LAST": self.sizes.last,
            "PRECISION": precision(self.x.dtype),
            "INDEX_64": needs_64_bit(self.x, *tensors),
            "BLOCK_OUT": self.out_block,
            "BLOCK_INNER": block_of(inner, self.inner_block),
            "BLOCK_PIXELS": self.pixel_block,
        }


def precision(dtype: torch.dtype) -> str:
    """How matrix products treat their operands, see ``multiply``; PyTorch's flag allows TF32."""
    if backend.INTERPRETED:
        return "interpreter"
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def allows_tf32() -> bool:
    """Whether PyTorch's own products of fp32 may run in TF32, by whichever of its settings was used."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # the newer setting says what the older one has no word for
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def input_gradient(grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, laid out as x: a plain matrix product, which cuBLAS has.

    Args:
        grad: of ``weight · x``, (N, groups·out_channels, H, W) or (tokens, groups·out_channels), like x.
        weight: (groups·out_channels, inner).
        x: (N, groups·inner, H, W) or (tokens, groups·inner), dense.
    """
    sizes, weights = Sizes.of(x), _grouped_weight(weight, x)
    grad = _grouped(grad, weights, sizes.last)
    if sizes.last:
        rows = torch.bmm(grad, weights).transpose(0, 1).flatten(1)
        if x.is_contiguous():  # tokens, 1×1 maps
            return rows.view_as(x)
        return rows.view(*x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    every = weights.mT.expand(sizes.images, *weights.mT.shape).flatten(0, 1)  # a view for one group
    return torch.bmm(every, grad).view_as(x)


def weight_gradient(grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The gradient of the weight, of the same arguments.

    Each image's share is rounded to its dtype, the sum is fp32.
    """
    last, weights = Sizes.of(x).last, _grouped_weight(weight, x)
    grad, x = _grouped(grad, weights, last), _grouped(x, weights, last)
    if last:
        return torch.bmm(grad.mT, x).view_as(weight)
    shares = torch.bmm(grad, x.mT).unflatten(0, (-1, weights.shape[0]))
    return shares.sum(0, dtype=torch.float32).to(weight.dtype).view_as(weight)


def _grouped_weight(weight: Tensor, x: Tensor) -> Tensor:
    """(groups, out channels, inner)."""
    inner = weight.shape[1]
    return weight.reshape(x.shape[1] // inner, -1, inner)


def _grouped(tensor: Tensor, weights: Tensor, last: bool) -> Tensor:
    """A view: (images·groups, channels, pixels), or (groups, pixels, channels) with channels last."""
    groups = weights.shape[0]
    if not last:
        return tensor.flatten(2).unflatten(1, (groups, -1)).flatten(0, 1)
    rows = tensor if tensor.dim() == 2 else tensor.permute(0, 2, 3, 1).flatten(0, 2)
    return rows.unflatten(1, (groups, -1)).transpose(0, 1)
