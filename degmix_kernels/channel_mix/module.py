"""The module around ``channel_mix``."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from degmix_kernels import checks
from degmix_kernels.activation import ACTIVATIONS
from degmix_kernels.batch_norm.module import BatchNorm2d
from degmix_kernels.batch_norm.running import kept_statistics, step_momentum
from degmix_kernels.channel_mix.op import channel_mix


class ChannelMix(nn.Module):
    """DeGMix's channel-aware mixing: 1×1 convolution, activation, BatchNorm.

    ``weight`` is (out_channels, in_channels, 1, 1), drawn as by ``nn.Conv2d``. ``norm`` is a
    ``BatchNorm2d``; converted to ``nn.SyncBatchNorm`` its statistics are those of all processes.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        activation: as in :func:`degmix_kernels.channel_mix`.
        bias: whether the convolution has a bias.
        eps: of the BatchNorm.
        momentum: of the BatchNorm.

    Raises:
        TypeError: for a channel count that is no integer, or another argument of a wrong type.
        ValueError: for a channel count below 1, an unknown activation, or what a BatchNorm2d refuses.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        activation: str = "gelu",
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        for name, channels in {"in_channels": in_channels, "out_channels": out_channels}.items():
            checks.expect_integer(name, channels, 1)
        checks.expect_choice("activation", activation, tuple(ACTIVATIONS))
        checks.scalar("bias", bias, bool)
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.norm = BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight.shape[1])
            nn.init.uniform_(self.bias, -bound, bound)
        self.norm.reset_parameters()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, C, H, W) → (B, Cout, H, W); ``residual``, shaped as the result, is added last."""
        norm = self.norm
        group = synchronised_group(norm) if isinstance(norm, nn.SyncBatchNorm) and self.training else None
        running_mean, running_var = kept_statistics(norm)
        return channel_mix(
            x,
            self.weight,
            self.bias,
            self.activation,
            running_mean=running_mean,
            running_var=running_var,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            training=norm.training,
            momentum=step_momentum(norm),
            eps=norm.eps,
            residual=residual,
            process_group=group,
        )

    def extra_repr(self) -> str:
        """Constructor arguments."""
        out_channels, in_channels = self.weight.shape[:2]
        bias = "" if self.bias is not None else ", bias=False"
        return f"{in_channels}, {out_channels}, activation={self.activation!r}{bias}"


def synchronised_group(norm: nn.SyncBatchNorm) -> dist.ProcessGroup | None:
    """The processes that share a batch's statistics; None if it is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if norm.process_group is None else norm.process_group
    return group if dist.get_world_size(group) > 1 else None
