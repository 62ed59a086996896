"""Every op of the library, one line per family: what contract tests, compile check and benchmarks run."""

from degmix_kernels import deform_conv
from degmix_kernels.contract import Op

OPS: tuple[Op, ...] = (*deform_conv.OPS,)
