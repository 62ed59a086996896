"""The deformable mixer encoder: where each task decides which pixels of the shared map it looks at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from degmix.model.gathered import gathered
from degmix.model.recompute import recomputed
from degmix_kernels import (
    BatchNorm2d,
    ChannelMix,
    DeformMix,
    batch_norm,
    channel_mix,
    coordinate_bias,
    deform_mix,
)
from degmix_kernels.batch_norm.running import update_all_running

Tables = tuple[Tensor, Tensor]  # of ``constant_tables``

# Tasks are mixed together, by the same kernels, as long as their offsets take no more bytes than this (all of
# NYUD-v2's, PASCAL's and Cityscapes' do at batch 8): with larger maps memory is what runs out.
TOGETHER_BYTES = 2**31


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
        mixers = list(self.values())
        tables = self._tables(x)
        together = self._together(x)
        maps = []
        for start in range(0, len(mixers), together):
            part = slice(start, start + together)
            own = tuple(table[:, part] for table in tables)
            maps += mix_tasks(mixers[part], x, own) if together > 1 else [mix_task(mixers[start], x, own)]
        return maps

    def _tables(self, x: Tensor) -> Tables:
        """:func:`constant_tables` of all layers, with two axes, depth and task, in front."""
        layers = [layer.offsets for tasks in zip(*self.values(), strict=True) for layer in tasks]
        dtype = torch.promote_types(x.dtype, torch.float32)
        return tuple(
            table.unflatten(0, (-1, len(self))) for table in constant_tables(layers, *x.shape[2:], dtype)
        )

    def _together(self, x: Tensor) -> int:
        """How many tasks are mixed together: as many as memory allows, if all are alike, unwatched."""
        norms = [norm for layers in self.values() for layer in layers for norm in layer.norms]
        if any(type(norm) is not BatchNorm2d for norm in norms):
            return 1
        kinds = {(n.training, n.momentum, n.eps, n.affine, n.track_running_stats) for n in norms}
        buffers = [
            each for norm in norms for each in (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        ]
        ordinary = len(kinds) == 1 and all(buffer is not None for buffer in buffers)
        ordinary = ordinary and norms[0].affine and norms[0].track_running_stats
        ordinary = ordinary and norms[0].momentum is not None
        one_dtype = len({parameter.dtype for parameter in self.parameters()}) == 1
        hooks = any(map(has_hooks, self.modules()))
        if torch.compiler.is_compiling() or not ordinary or not one_dtype or hooks:
            return 1  # compilers join operations themselves
        bytes_of_one = 2 * x.numel() * torch.promote_types(x.dtype, torch.float32).itemsize
        return max(1, min(TOGETHER_BYTES // max(bytes_of_one, 1), len(self)))


def has_hooks(module: nn.Module) -> bool:
    """Whether someone wants to know of this module's calls, as FSDP does, or a program that prunes."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


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

    @property
    def norms(self) -> tuple[nn.Module, nn.Module]:
        """Its two normalisations, in their order."""
        return self.channel_mix.norm, self.norm

    def forward(self, x: Tensor, tables: Tables | None = None) -> Tensor:
        """(B, C, H, W) → (B, C, H, W); ``tables`` as in :class:`Offsets`."""
        x = self.channel_mix(x)
        norm, weight = self.norm, self.offsets.opt.weight
        positions, tables = self.offsets.positions(x), self.offsets.tables(x, tables)
        offset = offsets_at(positions, weight, tables)
        with forgotten(offset, positions, weight, tables):
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

    def forward(self, x: Tensor, tables: Tables | None = None) -> Tensor:
        """Offsets at every pixel.

        Args:
            x: (B, C, H, W).
            tables: this layer's of :func:`constant_tables` for maps of that size; computed if not given.

        Returns:
            (B, 2·C, H, W); channel 2i is dy of channel i, 2i + 1 its dx.
        """
        return offsets_at(self.positions(x), self.opt.weight, self.tables(x, tables))

    def positions(self, x: Tensor) -> Tensor:
        """The learned positions, (B, 18, H, W), without bias."""
        return positions_of(x, self.p_conv.weight)

    def tables(self, x: Tensor, tables: Tables | None) -> Tables:
        """The given tables, or this layer's for maps like x."""
        if tables is None:
            tables = constant_tables([self], *x.shape[2:], torch.promote_types(x.dtype, torch.float32))
        return tables


def mix_task(layers: Iterable[MixerLayer], x: Tensor, tables: Tables) -> Tensor:
    """One task's layers on the shared map, (B, C, H, W); ``tables`` are (depth, 1, …)."""
    for depth, layer in enumerate(layers):
        x = layer(x, tuple(table[depth] for table in tables))
    return x


class Parameters(NamedTuple):
    """What a layer multiplies with, or several layers, behind each other along the first axis."""

    channel_weight: Tensor
    channel_bias: Tensor
    channel_norm_weight: Tensor
    channel_norm_bias: Tensor
    positions_weight: Tensor
    offsets_weight: Tensor
    deform_weight: Tensor
    deform_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    @classmethod
    def of(cls, layer: MixerLayer) -> Parameters:
        """Those of one layer."""
        first, deform, norm = layer.channel_mix, layer.deform_mix, layer.norm
        return cls(
            first.weight, first.bias, first.norm.weight, first.norm.bias, layer.offsets.p_conv.weight,
            layer.offsets.opt.weight, deform.weight, deform.bias, norm.weight, norm.bias,
        )  # fmt: skip


class Statistics(NamedTuple):
    """What a layer's two norms normalise by, or several layers' behind each other."""

    channel_mean: Tensor
    channel_variance: Tensor
    mean: Tensor
    variance: Tensor

    @classmethod
    def running(cls, layer: MixerLayer) -> Statistics:
        """The running ones of one layer."""
        return cls(*(each for norm in layer.norms for each in (norm.running_mean, norm.running_var)))


def mix_tasks(mixers: Sequence[Sequence[MixerLayer]], x: Tensor, tables: Tables) -> list[Tensor]:
    """The layers of T tasks on the shared map, (B, C, H, W), by the same operations; the tasks' results.

    The tasks' channels lie behind each other, as groups of every operation. All norms have the settings of
    the first; they are affine and have running statistics. ``tables`` are (depth, T, …).
    """
    depths = list(zip(*mixers, strict=True))
    layers = [layer for tasks in depths for layer in tasks]
    norm, channels, pixels = layers[0].norm, x.shape[1], x.shape[0] * x.shape[2] * x.shape[3]
    kinds = list(zip(*map(Parameters.of, layers), strict=True))
    every = [gathered(kinds)]
    if not norm.training:
        every.append(gathered(list(zip(*map(Statistics.running, layers), strict=True))))
    # Per depth, the parameters and statistics of its tasks, (T · first axis, …).
    every = [[each.unflatten(0, (len(depths), -1)).flatten(1, 2) for each in group] for group in every]
    parameters, *running = (list(zip(*group, strict=True)) for group in every)
    found = []
    for depth in range(len(depths)):
        own = tuple(table[depth] for table in tables)
        known = None if norm.training else Statistics(*running[0][depth])
        x, statistics = mix_depth(Parameters(*parameters[depth]), known, x, own, norm)
        found.append(statistics)
    if norm.training:
        update_statistics(layers, found, pixels)
    return list(x.split(channels, dim=1))


def update_statistics(layers: Sequence[MixerLayer], found: Sequence[Statistics], count: int) -> None:
    """Move the running statistics of all layers toward those ``found`` of ``count`` elements per channel.

    ``found`` has the layers' one depth after the other, its tasks' behind each other.
    """
    running = Statistics(*zip(*map(Statistics.running, layers), strict=True))
    found = Statistics(*zip(*found, strict=True))
    update_all_running(
        [*running.channel_mean, *running.mean, *running.channel_variance, *running.variance],
        [*found.channel_mean, *found.mean],
        [*found.channel_variance, *found.variance],
        count,
        layers[0].norm.momentum,
    )
    torch._foreach_add_([norm.num_batches_tracked for layer in layers for norm in layer.norms], 1)


def mix_depth(
    parameters: Parameters, running: Statistics | None, x: Tensor, tables: Tables, norm: BatchNorm2d
) -> tuple[Tensor, Statistics]:
    """One layer of T tasks: (B, C, H, W) for all of them, or (B, T·C, H, W) → (B, T·C, H, W).

    Normalised by ``running`` statistics or, without, by the batch's own; they are returned.
    """
    mix = partial(
        channel_mix,
        x,
        parameters.channel_weight,
        parameters.channel_bias,
        norm_weight=parameters.channel_norm_weight,
        norm_bias=parameters.channel_norm_bias,
        eps=norm.eps,
    )
    if running is None:
        x, *found = mix(statistics=True)
    else:
        x = mix(running_mean=running.channel_mean, running_var=running.channel_variance)
    positions = positions_of(x, parameters.positions_weight)
    offset = offsets_at(positions, parameters.offsets_weight, tables)
    with forgotten(offset, positions, parameters.offsets_weight, tables):
        weight, bias = parameters.deform_weight, parameters.deform_bias
        if running is None:
            mixed, *statistics = deform_mix(x, offset, weight, bias, statistics=True)
        else:
            mixed, statistics = deform_mix(x, offset, weight, bias), (running.mean, running.variance)
        with torch.autocast(x.device.type, enabled=False):
            norm_parameters = parameters.norm_weight, parameters.norm_bias
            x = batch_norm(mixed, *statistics, *norm_parameters, x, norm.eps)
    if running is None:
        running = Statistics(*found, *(each.detach() for each in statistics))
    return x, running


def forgotten(
    offset: Tensor, positions: Tensor, weight: Tensor, tables: Tables
) -> AbstractContextManager[None]:
    """Offsets, of 2·C channels in fp32, are the largest tensors of the head; the positions have 18."""
    return recomputed([(offset, offsets_again, (positions, weight, *tables))])


def offsets_again(positions: Tensor, weight: Tensor, *tables: Tensor) -> Tensor:
    """:func:`offsets_at`, of tensors alone."""
    return offsets_at(positions, weight, tables)


def positions_of(x: Tensor, weight: Tensor) -> Tensor:
    """Learned positions, without bias: (B, T·C, H, W) → (B, T·18, H, W) by a (T·18, C, 3, 3) weight."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return functional.conv2d(x, weight.to(x.dtype), padding=1, groups=x.shape[1] // weight.shape[1])


def offsets_at(positions: Tensor, weight: Tensor, tables: Tables) -> Tensor:
    """Offsets of T tasks, (B, T·2·C, H, W), from positions without bias and the tasks' constant tables.

    Args:
        positions: (B, T·18, H, W).
        weight: (T·2·C, 9, 3, 3).
        tables: as :func:`constant_tables` makes them, of T layers.
    """
    with torch.autocast(positions.device.type, enabled=False):
        groups = positions.shape[1] // weight.shape[1]
        learned = functional.conv2d(positions, weight.to(positions.dtype), padding=1, groups=groups)
        return coordinate_bias(learned, *tables)


def constant_tables(layers: Sequence[Offsets], height: int, width: int, dtype: torch.dtype) -> Tables:
    """The part of the offsets that is the same for every image, of several layers at once.

    It is the convolution ``opt`` of a grid of coordinates. Rows do not change from column to column and
    columns not from row to row, but for the zeros around the grid: of each half of the channels, a grid of
    three columns (or rows) has all values there are: those at the first border, inside, and at the last.
    Computed in fp64, then rounded to ``dtype``.

    Returns:
        (L, C, H, min(W, 3)) for the halves computed from rows and (L, C, min(H, 3), W) for the others, of L
        layers, as :func:`degmix_kernels.coordinate_bias` takes them.
    """
    kinds = zip(
        *((*layer.opt.weight.chunk(2), *layer.opt.bias.chunk(2), layer.p_conv.bias) for layer in layers),
        strict=True,
    )
    with torch.autocast(layers[0].opt.weight.device.type, enabled=False):
        *kernels, start = gathered(list(kinds), torch.float64)
        # 1-based coordinates of the 3×3 window around each pixel: (L, 9, H) rows and (L, 9, W) columns.
        numbers = torch.arange(max(height, width) + 2, device=start.device, dtype=start.dtype)
        rows, columns = (numbers.as_strided((3, size), (1, 1)) for size in (height, width))
        start = start.unflatten(1, (2, 3, 3, 1))
        rows = (start[:, 0] + rows[:, None]).flatten(0, 2)[..., None].expand(-1, -1, min(width, 3))
        columns = (start[:, 1] + columns).flatten(0, 2)[:, None].expand(-1, min(height, 3), -1)
        tables = []
        for grid, kernel, shift in zip((rows, columns), kernels[:2], kernels[2:], strict=True):
            table = functional.conv2d(
                grid[None], kernel.flatten(0, 1), shift.flatten(), padding=1, groups=len(layers)
            )
            tables.append(table.to(dtype).unflatten(1, (len(layers), -1))[0])
    return tuple(tables)
