"""Launches of ``linear_norm``'s kernels. Plans touch no memory."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels.launch import Launch, needs_64_bit
from degmix_kernels.linear_norm import kernels
from degmix_kernels.maps import Sizes, block_of, ceil_div, power_of_two
from degmix_kernels.product import Product

_PROGRAMS = 1024  # of the backward pass, as in ``maps``
_BACKWARD_TILE = 4096  # elements


def plan_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    addend: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    normed: Tensor | None,
    deviation: Tensor | None,
    eps: float,
) -> Launch:
    """Plan the forward pass.

    Args:
        x: (N, inner, H, W), or (blocks, tokens, inner) for as many matrices; dense.
        weight: (blocks, Cout, inner), contiguous; a single block for a map.
        bias: (blocks, Cout) or None.
        norm_weight: (blocks, Cout).
        norm_bias: (blocks, Cout).
        addend: laid out as the result, or None.
        residual: laid out as the result, or None.
        output: to be filled, laid out as x.
        normed: to be filled with x̂, laid out as x, if given.
        deviation: to be filled with 1 / √(variance + eps) of every pixel, fp32, with ``normed``.
        eps: added to the variance.
    """
    half = x.dtype != torch.float32
    out_block = block_of(weight.shape[1], 512)
    # A thread holds 64 sums of a product at most: with 512 out channels the pixels are fewer.
    largest = (16384 if half and out_block < 512 else 8192) // out_block
    product = Product(
        x,
        weight[0],
        out_block,
        block_of(Sizes.of(x).pixels, min(largest, 64)),
        32 if half and out_block < 512 else 16,
    )
    return Launch(
        kernels.forward,
        product.programs,
        {
            "x_ptr": x,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "norm_weight_ptr": norm_weight,
            "norm_bias_ptr": norm_bias,
            "addend_ptr": addend,
            "residual_ptr": residual,
            "output_ptr": output,
            "normed_ptr": normed,
            "deviation_ptr": deviation,
            "eps": eps,
            **product.arguments(),
        },
        {"BLOCKS": len(weight), **product.constants(output, weight)},
        num_warps=8 if out_block * product.pixel_block >= 4096 else 4,
        num_stages=3,
    )


def plan_backward(
    grad: Tensor, normed: Tensor, deviation: Tensor, norm_weight: Tensor, grad_pre: Tensor | None
) -> tuple[Launch, Tensor]:
    """Plan the way back through the LayerNorm.

    Args:
        grad: of the result, laid out as ``normed``.
        normed: from the forward pass.
        deviation: from the forward pass.
        norm_weight: (blocks, Cout).
        grad_pre: to be filled with the gradient before the LayerNorm, laid out as ``normed``; or None.

    Returns:
        The launch and the sums in parts that it fills, (3, blocks, parts, Cout), fp32: the gradients of
        norm_weight and norm_bias and, with ``grad_pre``, of bias.
    """
    sizes = Sizes.of(normed)
    channels = block_of(sizes.channels, 512)
    pixels = max(1, min(_BACKWARD_TILE // channels, power_of_two(sizes.pixels)))
    pixel_blocks = ceil_div(sizes.pixels, pixels)
    blocks = len(norm_weight)
    tiles = sizes.images * pixel_blocks // blocks
    steps = ceil_div(tiles * blocks, _PROGRAMS)
    parts = ceil_div(tiles, max(steps, 1))
    sums = normed.new_empty((3, blocks, parts, sizes.channels), dtype=torch.float32)
    unit = sizes.unit
    launch = Launch(
        kernels.backward,
        blocks * parts,
        {
            "grad_ptr": grad,
            "normed_ptr": normed,
            "deviation_ptr": deviation,
            "norm_weight_ptr": norm_weight,
            "grad_pre_ptr": grad_pre,
            "sums_ptr": sums,
            "channels": sizes.channels // unit if sizes.last else sizes.channels,
            "pixels": sizes.pixels if sizes.last else sizes.pixels // unit,
            "pixel_blocks": pixel_blocks,
            "tiles": tiles,
            "steps": steps,
            "parts": parts,
        },
        {
            "BLOCKS": blocks,
            "UNIT": unit,
            "LAST": sizes.last,
            "INDEX_64": needs_64_bit(normed, sums),
            "BLOCK_CHANNELS": channels,
            "BLOCK_PIXELS": pixels,
        },
        num_warps=_backward_warps(normed, channels * pixels, channels),
    )
    return launch, sums


def _backward_warps(normed: Tensor, tile: int, channels: int) -> int:
    """A thread keeps three sums of each of its channels: as many warps as leave it registers for them."""
    if channels > 256 or normed.dtype == torch.float32:
        return 16
    return 8 if tile >= 4096 else 4
