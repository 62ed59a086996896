"""Every op of the library, one line per family: what contract tests, compile check and benchmarks run."""

from degmix_kernels.attention import OPS as ATTENTION
from degmix_kernels.batch_norm import OPS as BATCH_NORM
from degmix_kernels.channel_mix import OPS as CHANNEL_MIX
from degmix_kernels.contract import Op
from degmix_kernels.coordinate_bias import OPS as COORDINATE_BIAS
from degmix_kernels.deform_conv import OPS as DEFORM_CONV
from degmix_kernels.gating import OPS as GATING
from degmix_kernels.linear_norm import OPS as LINEAR_NORM
from degmix_kernels.task_attention import OPS as TASK_ATTENTION

OPS: tuple[Op, ...] = (
    *DEFORM_CONV,
    *COORDINATE_BIAS,
    *BATCH_NORM,
    *CHANNEL_MIX,
    *LINEAR_NORM,
    *TASK_ATTENTION,
    *GATING,
    *ATTENTION,
)


def find(name: str, variant: str = "") -> Op:
    """The op of that name and variant.

    Raises:
        KeyError: if there is none.
    """
    for op in OPS:
        if (op.name, op.variant) == (name, variant):
            return op
    raise KeyError(f"no op {name!r} with variant {variant!r}")
