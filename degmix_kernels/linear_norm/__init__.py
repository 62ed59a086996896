"""Linear and LayerNorm in one pass, with what is added before and after."""

from degmix_kernels.linear_norm.cases import OPS
from degmix_kernels.linear_norm.module import LinearNorm
from degmix_kernels.linear_norm.op import linear_norm

__all__ = ["OPS", "LinearNorm", "linear_norm"]
