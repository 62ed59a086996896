"""The module around ``channel_mix``, and the BatchNorm it keeps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from degmix_kernels import autocast, checks
from degmix_kernels.activation import ACTIVATIONS
from degmix_kernels.channel_mix.op import channel_mix
from degmix_kernels.channel_mix.reference import batch_norm, mix_and_activate


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the right gradient on a CPU at batch 1, whatever layout the gradient has.

    Same arguments, state_dict and result; ``nn.SyncBatchNorm.convert_sync_batchnorm`` converts it like any
    other. Half-precision input is normalised in fp32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        self._check_input_dim(input)
        if self.uses_batch_statistics and input.numel() == input.shape[1]:
            expected = "Expected more than 1 value per channel when training"
            raise ValueError(f"{expected}, got input size {input.size()}")
        with autocast.disabled(input.device):
            return batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                step_momentum(self),
                self.eps,
            ).to(input.dtype)

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the next call normalises with the batch's own statistics."""
        return self.training or self.running_mean is None


def step_momentum(norm: nn.modules.batchnorm._BatchNorm) -> float:
    """Weight of the coming batch in the running statistics; counts the batch when in training."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a cumulative average
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum


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
        ValueError: for a channel count below 1 or an unknown activation.
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
            checks.expect(channels > 0, name, "at least 1", channels)
        checks.expect_choice("activation", activation, tuple(ACTIVATIONS))
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)
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
        if isinstance(norm, nn.SyncBatchNorm):
            return self._forward_synchronised(x, residual)
        return channel_mix(
            x,
            self.weight,
            self.bias,
            self.activation,
            running_mean=norm.running_mean,
            running_var=norm.running_var,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            training=norm.training,
            momentum=step_momentum(norm),
            eps=norm.eps,
            residual=residual,
        )

    def _forward_synchronised(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same through the norm's own forward, which talks to the other processes."""
        x, weight, bias, residual = autocast.cast_inputs(x.device, x, self.weight, self.bias, residual)
        with autocast.disabled(x.device):
            output = self.norm(mix_and_activate(x, weight, bias, self.activation))
            if residual is not None:
                output = output + residual
        return output.to(x.dtype)

    def extra_repr(self) -> str:
        """Constructor arguments."""
        out_channels, in_channels = self.weight.shape[:2]
        bias = "" if self.bias is not None else ", bias=False"
        return f"{in_channels}, {out_channels}, activation={self.activation!r}{bias}"
