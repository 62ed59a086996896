"""The deformable mixer encoder: where each task decides which pixels of the shared map it looks at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from degmix.model.recompute import recomputed
from degmix_kernels import BatchNorm2d, ChannelMix, DeformMix


class DeformableMixers(nn.ModuleDict):
    """The encoders of all tasks, each a stack of mixer layers.

    Args:
        tasks: names of the tasks.
        dim: channels C of the map.
        depth: number of layers of each.
    """

    def __init__(self, tasks: Iterable[str], dim: int, depth: int) -> None:
        super().__init__({task: nn.Sequential(*(MixerLayer(dim) for _ in range(depth))) for task in tasks})

    def forward(self, x: Tensor) -> list[Tensor]:
        """The shared map (B, C, H, W) → every task's, of the same shape."""
        offsets = [layer.offsets for layers in self.values() for layer in layers]
        dtype = torch.promote_types(x.dtype, torch.float32)
        tables = iter(constant_tables(offsets, *x.shape[2:], dtype))
        maps = []
        for layers in self.values():
            mixed = x
            for layer in layers:
                mixed = layer(mixed, next(tables))
            maps.append(mixed)
        return maps


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

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, C, H, W) → (B, C, H, W); ``tables`` as in :class:`Offsets`."""
        x = self.channel_mix(x)
        norm = self.norm
        positions, tables = self.offsets.positions(x), self.offsets.tables(x, tables)
        offset = self.offsets.at(positions, tables)
        again = partial(self.offsets.at, positions.detach(), tuple(table.detach() for table in tables))
        # Offsets are the largest tensors of the head, 2·C channels in fp32; the positions have 18.
        with recomputed([(offset, again)], list(self.offsets.parameters())):
            return self._mix(x, offset, norm)

    def _mix(self, x: Tensor, offset: Tensor, norm: nn.Module) -> Tensor:
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
    the small learned positions and in fp64 (:func:`constant_tables`): the gradient of a bilinear sample jumps
    where it crosses a pixel, and a sum in fp32 errs four times as far. Where cuDNN runs fp32 convolutions in
    TF32, as it does unless told otherwise, the learned part is that exact, 2⁻¹¹ of the learned positions;
    coordinates are not touched by it.

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

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Offsets at every pixel.

        Args:
            x: (B, C, H, W).
            tables: this layer's of :func:`constant_tables` for maps of that size; computed if not given.

        Returns:
            (B, 2·C, H, W); channel 2i is dy of channel i, 2i + 1 its dx.
        """
        return self.at(self.positions(x), self.tables(x, tables))

    def positions(self, x: Tensor) -> Tensor:
        """The learned positions, (B, 18, H, W), without bias."""
        with torch.autocast(x.device.type, enabled=False):
            return convolve(x.to(torch.promote_types(x.dtype, torch.float32)), self.p_conv)

    def tables(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The given tables, or this layer's for maps like x."""
        if tables is None:
            (tables,) = constant_tables([self], *x.shape[2:], torch.promote_types(x.dtype, torch.float32))
        return tables

    def at(self, positions: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Offsets from the learned positions and the constant tables."""
        with torch.autocast(positions.device.type, enabled=False):
            return convolve(positions, self.opt) + constant_offsets(tables, *positions.shape[2:])


def convolve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Apply a layer without its bias, in the dtype of ``x``."""
    return functional.conv2d(x, layer.weight.to(x.dtype), padding=layer.padding, groups=layer.groups)


def constant_tables(
    layers: Sequence[Offsets], height: int, width: int, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """The part of the offsets that is the same for every image, of several layers at once.

    It is the convolution ``opt`` of a grid of coordinates. Rows do not change from column to column and
    columns not from row to row, but for the zeros around the grid: of each half of the channels, a grid of
    three columns (or rows) has all values there are: those at the first border, inside, and at the last.
    Computed in fp64, then rounded to ``dtype``.

    Returns:
        Per layer (1, C, H, min(W, 3)) for the half computed from rows and (1, C, min(H, 3), W) for the other;
        :func:`constant_offsets` makes a map of them.
    """
    with torch.autocast(layers[0].opt.weight.device.type, enabled=False):
        weight = torch.stack([layer.opt.weight for layer in layers]).double()  # (L, 2·C, 9, 3, 3)
        bias = torch.stack([layer.opt.bias for layer in layers]).double()
        start = torch.stack([layer.p_conv.bias for layer in layers]).double()[..., None]  # (L, 18, 1)
        rows, columns = window_coordinates(height, width, like=start)
        rows = (start[:, :9] + rows)[..., None].expand(-1, -1, -1, min(width, 3))
        columns = (start[:, 9:] + columns)[:, :, None].expand(-1, -1, min(height, 3), -1)
        tables = []
        for grid, kernel, shift in zip((rows, columns), weight.chunk(2, 1), bias.chunk(2, 1), strict=True):
            windows = functional.unfold(grid, 3, padding=1)  # (L, 81, pixels)
            table = torch.baddbmm(shift[..., None], kernel.flatten(2), windows)
            tables.append(table.to(dtype).unflatten(2, grid.shape[2:]).split(1))
    return list(zip(*tables, strict=True))


def constant_offsets(tables: tuple[Tensor, Tensor], height: int, width: int) -> Tensor:
    """One layer's :func:`constant_tables` as a map, (1, 2·C, H, W)."""
    rows, columns = tables
    return torch.cat([repeat_middle(rows, 3, width), repeat_middle(columns, 2, height)], dim=1)


def repeat_middle(table: Tensor, dim: int, size: int) -> Tensor:
    """Repeat the second of three slices until there are ``size`` of them; fewer are all there."""
    if size <= 3:
        return table
    first, middle, last = table.split(1, dim)
    shape = list(table.shape)
    shape[dim] = size - 2
    return torch.cat([first, middle.expand(shape), last], dim)


def window_coordinates(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """1-based coordinates of the 3×3 window around each pixel.

    Returns:
        (9, height) rows and (9, width) columns, with device and dtype of ``like``.
    """
    options = {"device": like.device, "dtype": like.dtype}
    step = torch.arange(-1, 2, **options)
    rows = torch.arange(1, height + 1, **options) + step.repeat_interleave(3)[:, None]
    columns = torch.arange(1, width + 1, **options) + step.repeat(3)[:, None]
    return rows, columns
