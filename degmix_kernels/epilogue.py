"""What an op does with a result before it stores it: activation and statistics, and the way back.

Forward, y = act(z); backward, dz = (g + constant + linear · y) · act'(z), where the two vectors, one value
per channel, carry the gradients of the statistics: those of Σ y and Σ y²/2. Nothing but z is saved, and dz is
never written to memory. All arithmetic is fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = ("identity", "gelu", "relu", "silu")


@dataclass(frozen=True)
class Epilogue:
    """How the gradient of a result becomes the gradient of what the activation was given.

    Attributes:
        activation: one of ``ACTIVATIONS``.
        pre: z, in shape, layout and dtype of the result. Needed unless dz = g + constant.
        constant: fp32, one value per channel, added to the gradient of y, or None.
        linear: fp32, one value per channel, times y added to the gradient of y, or None.
    """

    activation: str = "identity"
    pre: Tensor | None = None
    constant: Tensor | None = None
    linear: Tensor | None = None

    def arguments(self) -> dict[str, Tensor | None]:
        """The kernel arguments that ``load_gradient`` reads, by name."""
        if self.pre is None and (self.activation != "identity" or self.linear is not None):
            raise ValueError("pre: expected a tensor, got None, which no activation's gradient can do with")
        uses_pre = self.activation != "identity" or self.linear is not None
        return {
            "pre_ptr": self.pre if uses_pre else None,
            "constant_ptr": self.constant,
            "linear_ptr": self.linear,
        }


@triton.jit
def normal(z):
    """Distribution function and density of the standard normal, from a single exponential.

    The tail is exp(-z²/2) · t · polynomial(t), t = 1 / (1 + 0.24 |z|), fitted to erfc in fp64. In fp32 it is
    exact to 5e-7 on a GPU, and to 6e-6 of itself far out, where 1 + erf cancels; and it takes fewer steps.
    """
    t = 1.0 / (1.0 + 0.24 * tl.abs(z))
    tail = -0.050778927976238605 * t + 0.14352141327940449
    tail = tail * t - 0.050041997706762126
    tail = tail * t + 0.10477428872914239
    tail = tail * t + 0.06983828978290835
    tail = tail * t + 0.09123004986117038
    tail = tail * t + 0.09571067755241378
    tail = tail * t + 0.09574614619658482
    bell = tl.exp(-0.5 * z * z)
    tail *= t * bell
    return tl.where(z < 0, tail, 1.0 - tail), 0.3989422804014327 * bell


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) of an fp32 tile; NaN stays NaN."""
    if ACTIVATION == "gelu":
        below, _ = normal(z)
        return z * below
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)
    if ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def activate_with_slope(z, ACTIVATION: tl.constexpr):
    """act(z) and act'(z) of an fp32 tile; NaN gives NaN in both."""
    if ACTIVATION == "gelu":
        below, density = normal(z)
        return z * below, below + z * density
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z), tl.where(z > 0, 1.0, tl.where(z == z, 0.0, z))
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        return z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))
    return z, z * 0.0 + 1.0


@triton.jit
def halves_of(tile, PART: tl.constexpr):
    """Both halves of a (channels, pixels) tile of more than PART pixels, else the tile: registers are few."""
    if tile.shape[1] > PART:
        pairs = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
        left, right = tl.split(tl.permute(pairs, (0, 2, 1)))
        halves = (left, right)
    else:
        halves = (tile,)
    return halves


@triton.jit
def store_result(
    z,  # (channels, pixels), fp32, or as it is stored: its statistics are then those of what is stored
    output_ptr,  # of the image, or None
    pre_ptr,  # of the image, for z, or None
    channel,  # (channels, 1)
    channel_valid,
    pixel_start,
    channels,
    pixels,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    INDEX_64: tl.constexpr,
    STATISTICS: tl.constexpr,
    PART: tl.constexpr,
):
    """Store act(z), and z if wanted; return mean and sum of squared deviations of act(z) over valid pixels.

    PART pixels are dealt with at a time, or a quarter of the tile if that is more.
    """
    mean, squares = 0.0, 0.0
    halves = halves_of(z, PART)
    for outer in tl.static_range(len(halves)):
        quarters = halves_of(halves[outer], PART)
        for inner in tl.static_range(len(quarters)):
            part = quarters[inner]
            before = (outer * len(quarters) + inner) * part.shape[1]
            pixel = pixel_start + before + tl.arange(0, part.shape[1])[None, :]
            if INDEX_64:
                pixel = pixel.to(tl.int64)
            valid = channel_valid & (pixel < pixels)
            address = pixel * channels + channel if LAST else channel * pixels + pixel
            if pre_ptr is not None:
                tl.store(pre_ptr + address, part.to(pre_ptr.dtype.element_ty), mask=valid)
            result = activate(part.to(tl.float32), ACTIVATION)
            if output_ptr is not None:
                tl.store(output_ptr + address, result.to(output_ptr.dtype.element_ty), mask=valid)
            if STATISTICS:  # Chan's formula; all parts before one with pixels are full
                count = tl.maximum(tl.minimum(pixels - pixel_start - before, part.shape[1]), 0)
                own_mean = tl.sum(tl.where(valid, result, 0.0), axis=1, keep_dims=True) / tl.maximum(count, 1)
                deviation = tl.where(valid, result - own_mean, 0.0)
                share = count.to(tl.float32) / tl.maximum(before + count, 1)
                difference = tl.where(count > 0, own_mean - mean, 0.0)
                mean += difference * share
                squares += tl.sum(deviation * deviation, axis=1, keep_dims=True)
                squares += difference * difference * share * before
    return mean, squares


@triton.jit
def load_gradient(
    grad_ptr,
    pre_ptr,  # z, laid out as the gradient, or None
    constant_ptr,  # one fp32 per channel, or None
    linear_ptr,  # one fp32 per channel, or None
    address,  # of the tile in grad and z
    channel,  # broadcasts to the tile
    channel_valid,  # as channel
    valid,  # (tile)
    ACTIVATION: tl.constexpr,
):
    """A tile of dz = (g + constant + linear · act(z)) · act'(z) in the dtype of g; 0 where not valid."""
    gradient = tl.load(grad_ptr + address, mask=valid, other=0.0)
    if (pre_ptr is None) and (constant_ptr is None):
        return gradient
    result = gradient.to(tl.float32)
    if constant_ptr is not None:
        result += tl.load(constant_ptr + channel, mask=channel_valid, other=0.0)
    if pre_ptr is not None:
        z = tl.load(pre_ptr + address, mask=valid, other=0.0).to(tl.float32)
        value, slope = activate_with_slope(z, ACTIVATION)
        if linear_ptr is not None:
            result += tl.load(linear_ptr + channel, mask=channel_valid, other=0.0) * value
        if ACTIVATION != "identity":
            result *= slope
    return tl.where(valid, result, 0.0).to(gradient.dtype)
