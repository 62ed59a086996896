"""The modules around ``deform_conv2d`` and ``deform_mix``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from degmix_kernels import checks
from degmix_kernels.activation import ACTIVATIONS
from degmix_kernels.deform_conv.mix_op import deform_mix
from degmix_kernels.deform_conv.op import checked_pair, deform_conv2d


class _Convolution(nn.Module):
    """The weight and bias of a convolution, drawn as ``nn.Conv2d`` draws them: uniform within 1/√fan_in."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, int], groups: int, bias: bool
    ) -> None:
        super().__init__()
        checks.expect_integer("groups", groups, 1)
        for name, channels in {"in_channels": in_channels, "out_channels": out_channels}.items():
            checks.expect_integer(name, channels, 1)
            checks.expect(channels % groups == 0, name, f"a multiple of {groups=}", channels)
        checks.scalar("bias", bias, bool)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)


class DeformConv2d(_Convolution):
    """Deformable convolution, a drop-in for ``torchvision.ops.DeformConv2d`` (arguments, state_dict, init).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: one integer or (height, width).
        stride: as in :func:`degmix_kernels.deform_conv2d`.
        padding: as in :func:`degmix_kernels.deform_conv2d`.
        dilation: as in :func:`degmix_kernels.deform_conv2d`.
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
        size = checked_pair("kernel_size", kernel_size, 1)
        super().__init__(in_channels, out_channels, size, groups, bias)
        self.kernel_size = size
        self.stride = checked_pair("stride", stride, 1)
        self.padding = checked_pair("padding", padding, 0)
        self.dilation = checked_pair("dilation", dilation, 1)
        self.groups = groups
        self.reset_parameters()

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Input, offset, mask and output shaped as in :func:`degmix_kernels.deform_conv2d`."""
        return deform_conv2d(
            input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )

    def extra_repr(self) -> str:
        """Constructor arguments that differ from their defaults, torchvision's way."""
        text = f"{self.in_channels}, {self.out_channels}"
        text += f", kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in {"padding": (0, 0), "dilation": (1, 1), "groups": 1}.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text if self.bias is not None else f"{text}, bias=False"


class DeformMix(_Convolution):
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
        checks.expect_choice("activation", activation, tuple(ACTIVATIONS))
        super().__init__(in_channels, out_channels, (1, 1), 1, bias)
        self.activation = activation
        self.reset_parameters()

    def forward(
        self, x: Tensor, offset: Tensor, statistics: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """(N, C, H, W), (N, 2·C, H, W) → (N, Cout, H, W), with its mean and biased variance if asked for."""
        return deform_mix(x, offset, self.weight, self.bias, self.activation, statistics)

    def extra_repr(self) -> str:
        """Constructor arguments."""
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_channels}, {self.out_channels}, activation={self.activation!r}{bias}"
