"""Deformable convolution: ``deform_conv2d`` (torchvision's, v1 and v2) and DeGMix's ``deform_mix``."""

from degmix_kernels.deform_conv.cases import OPS
from degmix_kernels.deform_conv.mix_op import deform_mix
from degmix_kernels.deform_conv.module import DeformConv2d, DeformMix
from degmix_kernels.deform_conv.op import deform_conv2d
from degmix_kernels.deform_conv.replace import replace_deform_conv

__all__ = ["OPS", "DeformConv2d", "DeformMix", "deform_conv2d", "deform_mix", "replace_deform_conv"]
