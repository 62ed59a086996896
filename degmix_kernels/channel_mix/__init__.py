"""Channel-aware mixing: 1×1 convolution, activation, BatchNorm and residual."""

from degmix_kernels.channel_mix.cases import OPS
from degmix_kernels.channel_mix.module import ChannelMix
from degmix_kernels.channel_mix.op import channel_mix

__all__ = ["OPS", "ChannelMix", "channel_mix"]
