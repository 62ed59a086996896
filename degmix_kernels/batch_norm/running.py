"""Running statistics, as ``nn.BatchNorm2d`` keeps them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def step_momentum(norm: nn.modules.batchnorm._BatchNorm) -> float:
    """Weight of the coming batch in the running statistics; counts the batch when in training."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a cumulative average
            count = norm.num_batches_tracked.item()
            torch._check(count >= 1)  # compilers then know that the momentum is in its range
            return 1.0 / count
    return 0.0 if norm.momentum is None else norm.momentum


def kept_statistics(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor | None, Tensor | None]:
    """Running mean and variance that the coming call reads or moves, as PyTorch decides it; or None twice."""
    if norm.training and not norm.track_running_stats:
        return None, None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: int | Tensor,
    momentum: float,
) -> None:
    """Move running statistics, in place, toward a batch's, as ``nn.BatchNorm2d`` does.

    Args:
        running_mean: (channels,).
        running_var: (channels,).
        mean: the batch's, fp32 or fp64.
        variance: the batch's, the biased one.
        count: elements per channel behind them; without any, nothing moves.
        momentum: weight of the batch.
    """
    update_all_running([running_mean, running_var], [mean], [variance], count, momentum)


@torch.no_grad()
def update_all_running(
    running: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    count: int | Tensor,
    momentum: float,
) -> None:
    """:func:`update_running` of several norms at once, whose batch statistics may lie behind each other.

    Args:
        running: (channels,) each: running means of all norms, then their running variances.
        means: the batch's, of one norm or of several in a row, in the order of ``running``.
        variances: the batch's, in the same order.
        count: elements per channel behind them.
        momentum: weight of the batch.
    """
    if isinstance(count, int) and count == 0:
        return
    batched = torch._C._are_functorch_transforms_active()  # vmap has no rules for lists of tensors
    if isinstance(count, int) and not batched:
        variances = torch._foreach_mul(variances, count / (count - 1))
    else:
        variances = [variance * (count / (count - 1)) for variance in variances]
    channels = len(running[0])
    batch = [each for every in (*means, *variances) for each in every.split(channels)]
    if not batched and all(one.dtype == new.dtype for one, new in zip(running, batch, strict=True)):
        torch._foreach_lerp_(running, batch, momentum)
        return
    for one, new in zip(running, batch, strict=True):
        one.copy_(torch.lerp(one.to(new.dtype), new, momentum))
