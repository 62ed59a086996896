"""Deformable convolution, the definition, in plain PyTorch: differentiable, exact in fp64, the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from degmix_kernels import autocast
from degmix_kernels.activation import activate


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Plain-PyTorch :func:`degmix_kernels.deform_conv2d`, with the same arguments (checked there).

    One kernel tap at a time: no column buffer of all taps is built unless autograd has to keep it.
    """
    stride, padding, dilation = as_pair(stride), as_pair(padding), as_pair(dilation)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_height, kernel_width = weight.shape
    out_height, out_width = offset.shape[2:]
    taps, pixels = kernel_height * kernel_width, out_height * out_width
    offset_groups = offset.shape[1] // (2 * taps)
    groups = channels // group_channels

    with autocast.disabled(input.device):
        # Two rows and columns of zeros before the map and one after: every corner of every sample then has
        # an address, and a sample outside the map lies on zeros only, so not even 0 · NaN leaks into it.
        padded = functional.pad(input.to(compute), (2, 1, 2, 1)).flatten(2)
        padded = padded.view(batch, offset_groups, channels // offset_groups, (height + 3) * (width + 3))
        # dim 2 is (dy, dx)
        offsets = offset.to(compute).reshape(batch, offset_groups, taps, 2, out_height, out_width)
        masks = None if mask is None else mask.to(compute).reshape(batch, offset_groups, taps, 1, pixels)
        weights = weight.to(compute).reshape(groups, out_channels // groups, group_channels, taps)
        first_row = torch.arange(out_height, device=input.device).mul(stride[0]).sub(padding[0])[:, None]
        first_column = torch.arange(out_width, device=input.device).mul(stride[1]).sub(padding[1])

        output = None
        for tap in range(taps):
            row = first_row + tap // kernel_width * dilation[0]
            column = first_column + tap % kernel_width * dilation[1]
            dy, dx = offsets[:, :, tap].unbind(2)  # each (batch, offset_groups, out_height, out_width)
            low_y, fraction_y = _split(dy, row, height)
            low_x, fraction_x = _split(dx, column, width)
            undefined = ((fraction_y + fraction_x) * 0).detach()  # 0, or NaN: a NaN in either spoils both
            fraction_y, fraction_x = fraction_y + undefined, fraction_x + undefined
            index = (low_y + 2) * (width + 3) + low_x + 2
            sampled = _blend(
                padded, index.flatten(2), fraction_y.flatten(2), fraction_x.flatten(2), width + 3
            )
            if masks is not None:
                sampled = sampled * masks[:, :, tap]
            sampled = sampled.reshape(batch, groups, group_channels, pixels)
            product = weights[..., tap] @ sampled  # (batch, groups, out_channels / groups, pixels)
            output = product if output is None else output + product
        output = output.reshape(batch, out_channels, out_height, out_width)
        if bias is not None:
            output = output + bias.to(compute)[:, None, None]
        return output.to(input.dtype)


def as_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """``(value, value)`` for an integer, the pair itself otherwise."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _split(offset: Tensor, base: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Integer part and fraction of ``base + offset`` along an axis of ``size`` pixels.

    The fraction comes from the offset alone, so it loses no digits to large coordinates. Its gradient with
    respect to the offset is 1, at integers too: the right-hand derivative. Coordinates with no pixel next to
    them, infinities included, become -2, a constant; so does the integer part of a NaN.
    """
    outside = (offset < -1 - base) | (offset >= size - base)
    offset = torch.where(outside, (-2 - base).to(offset.dtype), offset)
    low = offset.detach().floor()
    return torch.where(low.isnan(), -2, low.nan_to_num().long() + base), offset - low


def _blend(padded: Tensor, index: Tensor, fraction_y: Tensor, fraction_x: Tensor, row: int) -> Tensor:
    """Bilinear samples of all channels of a group.

    Args:
        padded: zero-padded maps, (batch, offset_groups, channels per group, padded pixels).
        index: address of the upper left corner, (batch, offset_groups, pixels).
        fraction_y: position between the upper and the lower corners, as ``index``.
        fraction_x: position between the left and the right corners, as ``index``.
        row: padded width.

    Returns:
        (batch, offset_groups, channels per group, pixels).
    """
    fraction_y, fraction_x = fraction_y[:, :, None], fraction_x[:, :, None]
    size = (*padded.shape[:3], index.shape[2])

    def corner(step: int) -> Tensor:
        return padded.gather(3, (index + step)[:, :, None].expand(size))

    upper = (1 - fraction_x) * corner(0) + fraction_x * corner(1)
    lower = (1 - fraction_x) * corner(row) + fraction_x * corner(row + 1)
    return (1 - fraction_y) * upper + fraction_y * lower


def deform_mix(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Plain-PyTorch :func:`degmix_kernels.deform_mix`, with the same arguments (checked there)."""
    with autocast.disabled(x.device):
        output = activate(deform_conv2d(x, offset, weight, bias), activation)
        if not statistics:
            return output
        exact = output.to(torch.promote_types(output.dtype, torch.float32))
        if exact.numel() == 0:
            return output, *exact.new_zeros(2, exact.shape[1]).unbind()
        mean = exact.mean((0, 2, 3))
        return output, mean, (exact - mean[:, None, None]).square().mean((0, 2, 3))
