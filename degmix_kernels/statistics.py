"""Mean and variance of a result that a kernel gathered in parts, block of pixels by block of pixels."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from degmix_kernels.launch import Launch, run
from degmix_kernels.maps import ceil_div, power_of_two


@dataclass(frozen=True)
class Statistics:
    """Per-channel statistics of a result in parts, one row per block of pixels, both fp32.

    Attributes:
        means: mean over the block's pixels, (blocks, channels).
        squares: sum of the squared deviations from that mean, (blocks, channels).
        block: pixels per block; the last block of every image may hold fewer.
    """

    means: Tensor
    squares: Tensor
    block: int


@triton.jit
def combine(
    means_ptr,  # (parts, channels)
    squares_ptr,
    mean_ptr,  # (channels,)
    variance_ptr,
    parts,
    blocks,  # parts of one image
    block,  # pixels of a part
    pixels,  # of one image
    channels,
    INDEX_64: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Mean and biased variance by Chan's formula, in fp64: a mean of a thousand deviations does no harm."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    channel_valid = channel < channels
    # Integers that are 1 arrive as constants, which have no methods, so no .to() here.
    elements = tl.full((), parts // blocks, tl.float64) * pixels
    mean = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), tl.float64)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)[:, None]
        valid = (part < parts) & channel_valid
        count = tl.minimum(pixels - part % blocks * block, block)
        mean += tl.load(means_ptr + part * channels + channel, mask=valid, other=0.0) * count.to(tl.float64)
    mean = tl.sum(mean, axis=0, keep_dims=True) / elements
    squares = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), tl.float64)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)[:, None]
        valid = (part < parts) & channel_valid
        count = tl.minimum(pixels - part % blocks * block, block)
        deviation = tl.load(means_ptr + part * channels + channel, mask=valid, other=0.0) - mean
        within = tl.load(squares_ptr + part * channels + channel, mask=valid, other=0.0)
        squares += tl.where(valid, within + deviation * deviation * count.to(tl.float64), 0.0)
    tl.store(mean_ptr + channel, mean.to(tl.float32), mask=channel_valid)
    variance = tl.sum(squares, axis=0, keep_dims=True) / elements
    tl.store(variance_ptr + channel, variance.to(tl.float32), mask=channel_valid)


def plan_combine(statistics: Statistics, pixels: int, mean: Tensor, variance: Tensor) -> Launch:
    """Plan the combination of the parts.

    Args:
        statistics: the parts of any number of images, filled.
        pixels: of one image.
        mean: to be filled, (channels,), fp32.
        variance: to be filled with the biased variance, (channels,), fp32.
    """
    parts, channels = statistics.means.shape
    block = min(16, power_of_two(channels))
    return Launch(
        combine,
        ceil_div(channels, block),
        {
            "means_ptr": statistics.means,
            "squares_ptr": statistics.squares,
            "mean_ptr": mean,
            "variance_ptr": variance,
            "parts": parts,
            "blocks": max(ceil_div(pixels, statistics.block), 1),
            "block": statistics.block,
            "pixels": pixels,
            "channels": channels,
        },
        {
            "INDEX_64": False,  # the parts are few however many the elements
            "BLOCK_PARTS": min(64, power_of_two(parts)),
            "BLOCK_CHANNELS": block,
        },
    )


def finish_statistics(statistics: Statistics, pixels: int, mean: Tensor, variance: Tensor) -> None:
    """Fill the mean and the biased variance of each channel, (channels,), fp32; zeros without elements.

    NaN would reach the gradients of a normalisation's parameters, which are sums over nothing.
    """
    if statistics.means.numel() == 0:
        mean.zero_()
        variance.zero_()
    else:
        run(plan_combine(statistics, pixels, mean, variance), mean.device)
