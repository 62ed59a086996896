"""The deformable mixer encoder: where each task decides which pixels of the shared map it looks at."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from degmix_kernels import BatchNorm2d, ChannelMix, DeformMix


class DeformableMixer(nn.Sequential):
    """One task's encoder, a stack of mixer layers.

    Args:
        dim: channels C of the map.
        depth: number of layers.
    """

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__(*(MixerLayer(dim) for _ in range(depth)))


class MixerLayer(nn.Module):
    """Channel-aware mixing, then the spatial-aware deformable operator.

    ``x = BN(GELU(Conv1x1(x)))``, then ``x + BN(GELU(DeformConv1x1(x, offsets(x))))``.

    Args:
        dim: channels C of the map.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.channel_mix = ChannelMix(dim, dim)
        self.offsets = Offsets(dim)
        self.deform_mix = DeformMix(dim, dim)
        self.norm = BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        x = self.channel_mix(x)
        offset, norm = self.offsets(x), self.norm
        if not isinstance(norm, BatchNorm2d):  # converted: nn.SyncBatchNorm gathers its statistics itself
            return x + norm(self.deform_mix(x, offset))
        if norm.uses_batch_statistics:
            mixed, mean, variance = self.deform_mix(x, offset, statistics=True)
            return norm(mixed, (mean, variance), residual=x)
        return norm(self.deform_mix(x, offset), residual=x)


class Offsets(nn.Module):
    """One (dy, dx) in pixels per channel and pixel, from learned positions and the pixel's own coordinates.

    Always in fp32 (fp64 for doubles), autocast or not: bf16 has no room for a pixel coordinate. Both
    convolutions are linear, so the large coordinates, the same for every image, pass through them apart from
    the small learned positions and in fp64: the gradient of a bilinear sample jumps where it crosses a pixel,
    and a sum in fp32 errs four times as far.

    ``p_conv.weight`` starts at zero, the rest is drawn as PyTorch does.

    Args:
        dim: channels C of the map.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.p_conv = nn.Conv2d(dim, 18, 3, padding=1)
        # Two groups: the first half of the channels is computed from rows only, the second from columns.
        self.opt = nn.Conv2d(18, 2 * dim, 3, padding=1, groups=2)
        nn.init.zeros_(self.p_conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, 2·C, H, W); channel 2i is dy of channel i, 2i + 1 its dx."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            learned = convolve(convolve(x, self.p_conv, None), self.opt, None)
            coordinates = window_grid(x.shape[2], x.shape[3], x.double())
            coordinates = coordinates + self.p_conv.bias.double()[:, None, None]
            return learned + convolve(coordinates, self.opt, self.opt.bias).to(x.dtype)


def convolve(x: Tensor, layer: nn.Conv2d, bias: Tensor | None) -> Tensor:
    """Apply a layer with this bias instead of its own, in the dtype of ``x``."""
    bias = None if bias is None else bias.to(x.dtype)
    return functional.conv2d(x, layer.weight.to(x.dtype), bias, padding=layer.padding, groups=layer.groups)


def window_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Coordinates of the 3×3 window around each pixel, 1-based: nine rows, then nine columns.

    Returns:
        (1, 18, height, width), with device and dtype of ``like``.
    """
    step = torch.arange(-1, 2, device=like.device, dtype=like.dtype)
    rows = (
        torch.arange(1, height + 1, device=like.device, dtype=like.dtype) + step.repeat_interleave(3)[:, None]
    )
    columns = torch.arange(1, width + 1, device=like.device, dtype=like.dtype) + step.repeat(3)[:, None]
    grids = (rows[:, :, None].expand(-1, -1, width), columns[:, None, :].expand(-1, height, -1))
    return torch.cat(grids)[None]
