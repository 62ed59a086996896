"""Channel-aware mixing, the public function: checks, autocast, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from degmix_kernels import autocast, backend, checks, maps
from degmix_kernels.activation import ACTIVATIONS
from degmix_kernels.batch_norm.running import update_running
from degmix_kernels.channel_mix import reference

if backend.HAS_TRITON:
    from degmix_kernels.channel_mix.autograd import mix_op


def channel_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """DeGMix's channel mixing, ``BatchNorm(activation(W x + b)) + residual``, with W a 1×1 convolution.

    Under autocast ``x``, ``weight``, ``bias`` and ``residual`` are cast to the autocast dtype and the result
    has it; what belongs to the normalisation keeps its dtype; doubles are left alone.

    Args:
        x: (B, C, H, W), or (tokens, C); floating point. channels_last in, channels_last out.
        weight: (Cout, C/groups) or (Cout, C/groups, 1, 1); the number of groups follows from it.
        bias: (Cout,).
        activation: ``"gelu"`` (exact), ``"relu"``, ``"silu"`` or ``"identity"``.
        running_mean: (Cout,), as of ``nn.BatchNorm2d``; updated in place in training. Without running
            statistics (give both or none) the batch's own are used in evaluation too.
        running_var: (Cout,), likewise.
        norm_weight: (Cout,), the normalisation's scale.
        norm_bias: (Cout,), its shift.
        training: whether to use the batch's statistics and update the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        residual: shaped as the result, added after the normalisation.
        process_group: processes that share the batch's statistics; None for this one alone. Each of them must
            make the call, forward and backward.
        statistics: whether to return the batch's statistics, too, for a caller who keeps running ones; only
            without running statistics here. They have no gradients.

    Returns:
        (B, Cout, H, W) or (tokens, Cout), in the dtype of ``x``; with ``statistics`` that, and the mean and
        biased variance it was normalised by, both (Cout,) in fp32 (fp64 for doubles).

    Raises:
        TypeError: for a wrong dtype or device.
        ValueError: for a wrong shape or value, and for a batch statistic over a single element.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows DeGMix, arXiv 2308.05721, the channel-aware mixing operator.
    """
    checks.expect_choice("activation", activation, tuple(ACTIVATIONS))
    for name, value in {"x": x, "weight": weight}.items():
        checks.expect_tensor(name, value)
        checks.expect(value.dim() in (2, 4), name, "2 or 4 dimensions", f"shape {tuple(value.shape)}")
    x, weight, bias, residual = autocast.cast_inputs(x.device, x, weight, bias, residual)
    checks.expect_like("weight", weight, "x", x)
    out_channels = weight.shape[0]
    tail = (1, 1) if weight.dim() == 4 else ()
    checks.expect(out_channels > 0 and x.shape[1] > 0, "weight", "no empty dimension", tuple(weight.shape))
    inner = weight.shape[1]
    divides = inner > 0 and x.shape[1] % inner == 0 and out_channels % (x.shape[1] // inner) == 0
    checks.expect(divides, "weight", "C/groups inputs and a multiple of groups rows", tuple(weight.shape))
    checks.expect_shape("weight", weight, (out_channels, inner, *tail))
    if bias is not None:
        checks.expect_tensor("bias", bias)
        checks.expect_like("bias", bias, "x", x)
        checks.expect_shape("bias", bias, (out_channels,))
    if residual is not None:
        checks.expect_tensor("residual", residual)
        checks.expect_like("residual", residual, "x", x)
        checks.expect_shape("residual", residual, (x.shape[0], out_channels, *x.shape[2:]))
    norm = {
        "running_mean": running_mean,
        "running_var": running_var,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }
    for name, value in norm.items():
        if value is not None:
            checks.expect_tensor(name, value)
            checks.expect_shape(name, value, (out_channels,))
            if value.device != x.device:
                raise TypeError(f"{name}: expected device {x.device} as x, got {value.device}")
    both = (running_mean is None) == (running_var is None)
    checks.expect(both, "running_var", "running_mean and running_var, or neither", "one of them")
    alone = not statistics or running_mean is None
    checks.expect(alone, "statistics", "False along with running_mean and running_var", statistics)
    elements = x.numel() // x.shape[1]
    batch = training or running_mean is None
    if batch and process_group is None:
        message = "more than one element per channel for a batch statistic"
        checks.expect(elements != 1, "x", message, f"shape {tuple(x.shape)}")
    if not backend.runs_triton("channel_mix", x.device, x.dtype):
        output = reference.channel_mix(
            x,
            weight,
            bias,
            activation,
            running_mean=running_mean,
            running_var=running_var,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            process_group=process_group,
            statistics=statistics,
        )
        output, *rest = output if statistics else (output,)
        if x.dim() == 4 and maps.is_channels_last(x):
            output = output.contiguous(memory_format=torch.channels_last)
        return (output, *rest) if statistics else output
    leaves = (t for t in (x, weight, bias, norm_weight, norm_bias) if t is not None)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in leaves)
    constants = (None, None) if batch else (running_mean, running_var)
    name = None if process_group is None else process_group.group_name
    output, _, mean, variance, count = mix_op(
        x, weight, bias, norm_weight, norm_bias, residual, *constants, activation, eps, keep, name
    )
    if training and running_mean is not None:
        count = elements if process_group is None else count
        update_running(running_mean, running_var, mean, variance, count, momentum)
    return (output, mean, variance) if statistics else output
