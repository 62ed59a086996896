"""A small convolutional backbone for the demo and the tests: no download, no timm, quick on a CPU."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from degmix_kernels import BatchNorm2d


class TinyBackbone(nn.Module):
    """Four stages of a strided convolution and a residual block, some 400 000 parameters.

    Convolutions and BatchNorms keep PyTorch's default initialisation. Any image size: each stage rounds up.
    """

    channels = (32, 48, 64, 96)

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 16, stride=2)
        widths = (16, *self.channels)
        self.stages = nn.ModuleList(
            nn.Sequential(ConvNorm(before, after, stride=2), Residual(after))
            for before, after in pairwise(widths)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) → (B, channels[i], ⌈H/s⌉, ⌈W/s⌉) for s = 4, 8, 16, 32."""
        x, features = self.stem(image), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class ConvNorm(nn.Sequential):
    """A 3×3 convolution, BatchNorm, ReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class Residual(nn.Module):
    """Two 3×3 convolutions with BatchNorm around a shortcut.

    Args:
        channels: channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvNorm(channels, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) → (B, channels, H, W)."""
        return functional.relu(x + self.norm(self.conv(self.first(x))))
