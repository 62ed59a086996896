"""The modules around ``deform_conv2d`` and ``deform_mix``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from degmix_kernels import checks
from degmix_kernels.activation import ACTIVATIONS
from degmix_kernels.deform_conv.mix_op import deform_mix
from degmix_kernels.deform_conv.op import checked_pair, deform_conv2d


def _initialise(weight: Tensor, bias: Tensor | None) -> None:
    """As ``nn.Conv2d`` and torchvision's ``DeformConv2d``: uniform within 1/√fan_in."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        nn.init.uniform_(bias, -bound, bound)


class DeformConv2d(nn.Module):
    """Deformable convolution, a drop-in for ``torchvision.ops.DeformConv2d`` (arguments, state_dict, init).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one integer or (height, width).
        stride: as in :func:`degmix_kernels.deform_conv2d`.
        padding: as there.
        dilation: as there.
        groups: blocks of channels convolved separately.
        bias: whether a bias is learned.

    Raises:
        TypeError: for a size that is no integer (or pair of integers, where one may be given).
        ValueError: for sizes out of range, or channels that ``groups`` does not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        checks.expect_integer("groups", groups, 1)
        for name, channels in {"in_channels": in_channels, "out_channels": out_channels}.items():
            checks.expect_integer(name, channels, 1)
            checks.expect(channels % groups == 0, name, f"a multiple of {groups=}", channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = checked_pair("kernel_size", kernel_size, 1)
        self.stride = checked_pair("stride", stride, 1)
        self.padding = checked_pair("padding", padding, 0)
        self.dilation = checked_pair("dilation", dilation, 1)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        _initialise(self.weight, self.bias)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Input, offset, mask and output shaped as in :func:`degmix_kernels.deform_conv2d`."""
        return deform_conv2d(
            input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )

    def extra_repr(self) -> str:
        """Constructor arguments that differ from their defaults, torchvision's way."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
        if self.padding != (0, 0):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        return text


class DeformMix(nn.Module):
    """DeGMix's spatial-aware deformable operator: sample every channel on its own, mix channels, activate.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        activation: as in :func:`degmix_kernels.deform_mix`.
        bias: whether a bias is learned.

    Raises:
        TypeError: for a channel count that is no integer.
        ValueError: for a channel count below 1 or an unknown activation.
    """

    def __init__(
        self, in_channels: int, out_channels: int, activation: str = "gelu", bias: bool = True
    ) -> None:
        super().__init__()
        for name, channels in {"in_channels": in_channels, "out_channels": out_channels}.items():
            checks.expect_integer(name, channels, 1)
        checks.expect_choice("activation", activation, tuple(ACTIVATIONS))
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 1, 1))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        _initialise(self.weight, self.bias)

    def forward(
        self, x: Tensor, offset: Tensor, statistics: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """(N, C, H, W), (N, 2·C, H, W) → (N, Cout, H, W), with its mean and biased variance if asked for."""
        return deform_mix(x, offset, self.weight, self.bias, self.activation, statistics)

    def extra_repr(self) -> str:
        """Constructor arguments."""
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_channels}, {self.out_channels}, activation={self.activation!r}{bias}"
