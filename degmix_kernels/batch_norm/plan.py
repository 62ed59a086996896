"""Launches of ``batch_norm``'s kernels: sizes, blocks, shares. Plans touch no memory."""

from __future__ import annotations

import torch
from torch import Tensor

from degmix_kernels.batch_norm import kernels
from degmix_kernels.launch import Launch
from degmix_kernels.maps import Sizes, backward_shares, ceil_div, power_of_two, warps

_FORWARD_TILE = 4096  # elements


def plan_forward(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    eps: float,
    activation: str = "identity",
) -> Launch:
    """The forward pass on dense tensors, vectors contiguous; what is normalised is the activation of x."""
    sizes = Sizes.of(x)
    blocks = sizes.blocks(_FORWARD_TILE)
    arguments = sizes.arguments(blocks)
    return Launch(
        kernels.forward,
        sizes.images * arguments["channel_blocks"] * arguments["pixel_blocks"],
        {
            "x_ptr": x,
            "residual_ptr": residual,
            "mean_ptr": mean,
            "variance_ptr": variance,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "output_ptr": output,
            "eps": eps,
            **arguments,
        },
        {"ACTIVATION": activation, **sizes.constants(blocks, x)},
        num_warps=warps(blocks),
    )


def plan_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    grad_x: Tensor | None,
    sums: bool,
    products: bool,
    eps: float,
    activation: str = "identity",
) -> tuple[Launch, Tensor | None]:
    """The pass over the gradient, laid out as x.

    Args:
        grad: of the result.
        x: as in the forward pass.
        mean: as in the forward pass.
        variance: as in the forward pass.
        weight: as in the forward pass.
        grad_x: filled, if given.
        sums: whether to sum g.
        products: whether to sum g·(x − mean) too.
        eps: as in the forward pass.
        activation: as in the forward pass. ``grad_x`` is the gradient of its result.

    Returns:
        The launch and the sums in parts, (2, parts, channels), fp32, which it fills, or None.
    """
    sizes = Sizes.of(x)
    blocks, parts, arguments = backward_shares(sizes)
    partial = grad.new_empty((2, parts, sizes.channels), dtype=torch.float32) if sums else None
    launch = Launch(
        kernels.backward,
        parts * arguments["channel_blocks"],
        {
            "grad_ptr": grad,
            "x_ptr": x if products else None,
            "mean_ptr": mean,
            "variance_ptr": variance,
            "weight_ptr": weight,
            "grad_x_ptr": grad_x,
            "sums_ptr": partial,
            "eps": eps,
            **arguments,
            "parts": parts,
        },
        {"ACTIVATION": activation, **sizes.constants(blocks, x)},
        # An activation's temporaries spill on 4 warps, channels last.
        num_warps=8 if sizes.last and activation != "identity" else warps(blocks),
    )
    return launch, partial


def plan_finish(
    partial: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    grad_mean: Tensor | None,
    grad_variance: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    eps: float,
) -> Launch:
    """The vectors' gradients, fp32, each filled if given, from the sums of ``plan_backward``."""
    _, parts, channels = partial.shape
    block = min(power_of_two(channels), 16)
    return Launch(
        kernels.finish,
        ceil_div(channels, block),
        {
            "sums_ptr": partial,
            "variance_ptr": variance,
            "weight_ptr": weight,
            "grad_mean_ptr": grad_mean,
            "grad_variance_ptr": grad_variance,
            "grad_weight_ptr": grad_weight,
            "grad_bias_ptr": grad_bias,
            "eps": eps,
            "parts": parts,
            "channels": channels,
        },
        {
            "INDEX_64": False,  # the sums are few however many the elements
            "BLOCK_PARTS": min(power_of_two(parts), 128),
            "BLOCK_CHANNELS": block,
        },
        num_warps=4,
    )
