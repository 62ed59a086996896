"""Bugs in what all ops share: products, epilogues, statistics, launches, checks, autocast, backends."""

from __future__ import annotations

from tests.mutations.mutation import FP32, Mutation, select

SHARED = (
    Mutation(
        "product: one inner element too many",
        "degmix_kernels/product.py",
        "index_valid = index < inner",
        "index_valid = index <= inner",
        (select("test_contract", FP32 + "channel_mix"),),
    ),
    Mutation(
        "product: the weight's gradient of the first image alone",
        "degmix_kernels/product.py",
        "return shares.sum(0, dtype=torch.float32).to(weight.dtype).view_as(weight)",
        "return shares[0].view_as(weight)",
        (select("test_contract", FP32 + "channel_mix"), select("test_contract", FP32 + "linear_norm")),
    ),
    Mutation(
        "epilogue: halves of a tile count the same in a mean",
        "degmix_kernels/epilogue.py",
        "share = count.to(tl.float32) / (BLOCK // 2 + count)",
        "share = 0.5",
        (select("kernels/test_planar", "test_epilogue or far_from_zero"),),
    ),
    Mutation(
        "epilogue: the variance's gradient takes z for act(z)",
        "degmix_kernels/epilogue.py",
        "mask=channel_valid, other=0.0) * value",
        "mask=channel_valid, other=0.0) * z",
        (select("kernels/test_planar", "test_epilogue or far_from_zero"),),
    ),
    Mutation(
        "epilogue: the slope of silu",
        "degmix_kernels/epilogue.py",
        "sigmoid * (1.0 + z * (1.0 - sigmoid))",
        "sigmoid * (1.0 + z * sigmoid)",
        (
            select("kernels/test_planar", "test_epilogue or far_from_zero"),
            select("test_contract", FP32 + "channel_mix"),
        ),
    ),
    Mutation(
        "epilogue: the slope of relu loses a NaN",
        "degmix_kernels/epilogue.py",
        "tl.where(z > 0, 1.0, tl.where(z == z, 0.0, z))",
        "tl.where(z > 0, 1.0, 0.0)",
        (select("kernels/test_planar", "undefined or activation_of_nan"),),
    ),
    Mutation(
        "statistics: an image's last part counts as a whole one",
        "degmix_kernels/statistics.py",
        "count = tl.minimum(pixels - part % blocks * block, block)\n        mean +=",
        "count = tl.minimum(pixels, block)\n        mean +=",
        (select("kernels/test_planar", "chan_formula"),),
    ),
    Mutation(
        "statistics: the means' own spread is left out of the variance",
        "degmix_kernels/statistics.py",
        "tl.where(valid, within + deviation * deviation * count.to(tl.float64), 0.0)",
        "tl.where(valid, within, 0.0)",
        (select("kernels/test_planar", "chan_formula"),),
    ),
    Mutation(
        "statistics: without elements they are not a number",
        "degmix_kernels/statistics.py",
        "if statistics.means.numel() == 0:",
        "if statistics.means.shape[1] == 0:",
        (select("kernels/test_planar", "chan_formula"),),
    ),
    Mutation(
        "launch: only the longest axis decides on 64 bits",
        "degmix_kernels/launch.py",
        "last = sum(map(mul, tensor.shape, strides)) - sum(strides)",
        "last = max(((size - 1) * step for size, step in zip(tensor.shape, strides)), default=0)",
        (
            select("kernels/test_batch_norm", "plans_know"),
            select("kernels/test_task_attention", "plans_know"),
        ),
    ),
    Mutation(
        "launch: registers are limited on AMD, too",
        "degmix_kernels/launch.py",
        "return torch.version.hip is None and _capability(",
        "return _capability(",
        (select("kernels/test_launch"),),
    ),
    Mutation(
        "backend: a forced backend that cannot run gives way",
        "degmix_kernels/backend.py",
        'if forced == "triton" and not runnable:',
        'if forced == "triton" and not runnable and not HAS_TRITON:',
        (select("test_contract", "forced_backend and batch_norm"),),
    ),
    Mutation(
        "autocast: doubles are cast",
        "degmix_kernels/autocast.py",
        "if tensor is None or tensor.dtype == torch.float64:",
        "if tensor is None:",
        (select("test_contract", "autocast and (batch_norm or linear_norm)"),),
    ),
    Mutation(
        "autocast: offsets of the other half outside of autocast",
        "degmix_kernels/define.py",
        "if field.own_dtype or (field.coordinates and value.dtype == torch.float32):",
        "if field.own_dtype or field.coordinates:",
        (select("kernels/test_deform_conv_arguments"),),
    ),
    Mutation(
        "checks: a bool is an integer",
        "degmix_kernels/checks.py",
        " and not isinstance(value, bool)",
        "",
        (select("kernels/test_deform_conv_arguments"),),
    ),
    Mutation(
        "checks: a shape may be broadcast",
        "degmix_kernels/checks.py",
        "if value is not None and value.shape != shape:",
        "if value is not None and any(a not in (1, b) for a, b in zip(value.shape, shape, strict=True)):",
        (select("kernels/test_batch_norm", "bad_input"), select("kernels/test_deform_conv_arguments")),
    ),
)
