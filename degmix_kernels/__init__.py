"""Triton kernels for deformable convolution, channel mixing and gated attention, each with its reference."""

from degmix_kernels.backend import can_run, use_backend
from degmix_kernels.deform_conv import DeformConv2d, DeformMix, deform_conv2d, deform_mix

__all__ = ["DeformConv2d", "DeformMix", "can_run", "deform_conv2d", "deform_mix", "use_backend"]
