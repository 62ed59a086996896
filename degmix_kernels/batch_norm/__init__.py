"""Batch normalisation by statistics that another kernel gathered."""

from degmix_kernels.batch_norm.cases import OPS
from degmix_kernels.batch_norm.module import BatchNorm2d
from degmix_kernels.batch_norm.op import batch_norm

__all__ = ["OPS", "BatchNorm2d", "batch_norm"]
