"""Triton kernels for deformable convolution, channel mixing and gated attention, each with its reference."""

from degmix_kernels.attention import GatedAttention, LinearAttention, gated_attention, linear_attention
from degmix_kernels.backend import can_run, use_backend
from degmix_kernels.batch_norm import BatchNorm2d, batch_norm
from degmix_kernels.channel_mix import ChannelMix, channel_mix
from degmix_kernels.coordinate_bias import CoordinateBias, coordinate_bias
from degmix_kernels.define import fvcore_handles
from degmix_kernels.deform_conv import DeformConv2d, DeformMix, deform_conv2d, deform_mix, replace_deform_conv
from degmix_kernels.gating import GatedMLP, SpatialGatingUnit, gated_mlp, spatial_gating_unit
from degmix_kernels.linear_norm import LinearNorm, linear_norm
from degmix_kernels.task_attention import TaskAttention, task_attention

__all__ = [
    "BatchNorm2d",
    "ChannelMix",
    "CoordinateBias",
    "DeformConv2d",
    "DeformMix",
    "GatedAttention",
    "GatedMLP",
    "LinearAttention",
    "LinearNorm",
    "SpatialGatingUnit",
    "TaskAttention",
    "batch_norm",
    "can_run",
    "channel_mix",
    "coordinate_bias",
    "deform_conv2d",
    "deform_mix",
    "fvcore_handles",
    "gated_attention",
    "gated_mlp",
    "linear_attention",
    "linear_norm",
    "replace_deform_conv",
    "spatial_gating_unit",
    "task_attention",
    "use_backend",
]
