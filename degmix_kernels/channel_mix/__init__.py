"""Channel-aware mixing: 1×1 convolution, activation, BatchNorm and residual."""

from degmix_kernels.channel_mix.entry import OPS
from degmix_kernels.channel_mix.module import BatchNorm2d, ChannelMix
from degmix_kernels.channel_mix.op import channel_mix

__all__ = ["OPS", "BatchNorm2d", "ChannelMix", "channel_mix"]
