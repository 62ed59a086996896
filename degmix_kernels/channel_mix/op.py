"""Channel-aware mixing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from degmix_kernels import backend, checks, maps
from degmix_kernels.activation import ACTIVATIONS
from degmix_kernels.batch_norm.running import update_running
from degmix_kernels.channel_mix import reference
from degmix_kernels.channel_mix.group import combine, mean_of
from degmix_kernels.define import Constant, NotNegative, OwnDtype, define
from degmix_kernels.launch import run

if backend.HAS_TRITON:
    from degmix_kernels.batch_norm import plan as norm_plan
    from degmix_kernels.channel_mix import plan
    from degmix_kernels.product import input_gradient, weight_gradient
    from degmix_kernels.statistics import finish_statistics

_SHARE = checks.Range(0.0, 1.0)


class Call(NamedTuple):
    """Arguments of the op behind :func:`channel_mix`.

    Without running statistics the batch's own are used. ``keep``: whether to keep what comes before the
    activation. ``group``: the name of the processes that share the batch's statistics.
    """

    x: Tensor
    weight: Tensor
    residual: Tensor | None
    bias: Tensor | None
    norm_weight: OwnDtype | None
    norm_bias: OwnDtype | None
    running_mean: Constant | None
    running_var: Constant | None
    activation: Annotated[str, checks.OneOf(tuple(ACTIVATIONS))]
    eps: NotNegative
    keep: bool
    group: str | None


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
        running_var: (Cout,), as of ``nn.BatchNorm2d``.
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
        TypeError: for a wrong type, dtype or device.
        ValueError: for a wrong shape or value, and for a batch statistic over a single element.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows DeGMix, arXiv 2308.05721, the channel-aware mixing operator.
    """
    training = checks.scalar("training", training, bool)
    momentum = checks.scalar("momentum", momentum, float, allowed=_SHARE)
    statistics = checks.scalar("statistics", statistics, bool)
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        raise TypeError(f"process_group: expected a ProcessGroup or None, got {type(process_group).__name__}")
    batch = training or running_mean is None
    group = process_group.group_name if batch and process_group is not None else None
    call = op.checked(
        x, weight, residual, bias, norm_weight, norm_bias, running_mean, running_var, activation, eps, True,
        group,
    )  # fmt: skip
    x, weight = call.x, call.weight
    _check_shapes(call)
    both = (running_mean is None) == (running_var is None)
    checks.expect(both, "running_var", "running_mean and running_var, or neither", "one of them")
    alone = not statistics or running_mean is None
    checks.expect(alone, "statistics", "False along with running_mean and running_var", statistics)
    elements = x.numel() // x.shape[1]
    if batch and process_group is None:
        checks.expect(elements != 1, "x", "more than one element per channel for a batch statistic", x.shape)
    if op.runs_triton(call):
        if batch:
            call = Call(*tuple(call)[:6], None, None, *tuple(call)[8:])
        output, _, mean, variance, count = op(call)
        if training and running_mean is not None:
            count = elements if process_group is None else count
            update_running(running_mean, running_var, mean, variance, count, momentum)
        return (output, mean, variance) if statistics else output
    output = reference.channel_mix(
        x,
        weight,
        call.bias,
        call.activation,
        running_mean=running_mean,
        running_var=running_var,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        training=training,
        momentum=momentum,
        eps=call.eps,
        residual=call.residual,
        process_group=process_group,
        statistics=statistics,
    )
    if statistics:
        return (*maps.laid_out(x, output[0]), *output[1:])
    return maps.laid_out(x, output)[0]


def _check_shapes(call: Call) -> None:
    x, weight = call.x, call.weight
    for name, tensor in (("x", x), ("weight", weight)):
        checks.expect(tensor.dim() in (2, 4), name, "2 or 4 dimensions", tensor.shape)
    checks.expect(x.shape[1] > 0, "x", "at least one channel", x.shape)
    out_channels, inner = weight.shape[:2]
    checks.expect(out_channels > 0, "weight", "no empty dimension", weight.shape)
    divides = inner > 0 and x.shape[1] % inner == 0 and out_channels % (x.shape[1] // inner) == 0
    checks.expect(divides, "weight", "C/groups inputs and a multiple of groups rows", tuple(weight.shape))
    checks.expect_shape("weight", weight, (out_channels, inner, *([1] * (weight.dim() - 2))))
    for name in Call._fields[3:8]:
        checks.expect_shape(name, getattr(call, name), (out_channels,))
    checks.expect_shape("residual", call.residual, (x.shape[0], out_channels, *x.shape[2:]))


def _outputs(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result; what comes before the activation; mean, variance and number of a batch's elements.

    All but the result may be empty: the second unless it is kept, mean and variance with running statistics.
    The number is that of all processes of the group, and empty without a group.
    """
    x, channels = call.x, call.weight.shape[0]
    shape, layout = (x.shape[0], channels, *x.shape[2:]), maps.memory_format(x)
    output = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    pre = torch.empty_like(output) if call.keep else x.new_empty(0)
    size = channels if call.running_mean is None else 0
    sizes = (size, size, 0 if call.group is None else 1)
    return output, pre, *(x.new_empty(each, dtype=torch.float32) for each in sizes)


def _dense(call: Call) -> Call:
    """The call as kernels read it: maps laid out as x, the weight a matrix, vectors contiguous."""
    x, residual = maps.laid_out(call.x, call.x, call.residual)
    weight = call.weight.reshape(call.weight.shape[:2]).contiguous()
    return Call(x, weight, residual, *maps.contiguous(*call[3:8]), *call[8:])


def _forward(call: Call, output: Tensor, pre: Tensor, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    call = _dense(call)
    x, weight, residual, bias, *norm, running_mean, running_var, activation, eps, keep, group = call
    if running_mean is not None:
        given = (running_mean, running_var, *norm, residual, output, eps)
        run(plan.plan_forward(x, weight, bias, activation, pre if keep else None, *given), x.device)
        return
    z = pre if keep else torch.empty_like(output)
    launch, statistics = plan.plan_product(x, weight, bias, activation, z)
    run(launch, x.device)
    sizes = maps.Sizes.of(x)
    finish_statistics(statistics, sizes.pixels, mean, variance)
    if group is not None:
        every = combine(mean, variance, sizes.images * sizes.pixels, group)
        for own, of_group in zip((mean, variance, count), every, strict=True):
            own.copy_(of_group)
    run(norm_plan.plan_forward(z, mean, variance, *norm, residual, output, eps, activation), x.device)


def _backward(
    call: Call, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Call
) -> dict[str, Tensor | None]:
    shape = call.weight.shape
    call = _dense(call)
    x, weight, activation, eps = call.x, call.weight, call.activation, call.eps
    pre, mean, variance, count = kept
    batch = call.running_mean is None
    if not batch:
        mean, variance = call.running_mean, call.running_var
    norm = (mean, variance, call.norm_weight)
    (grad,) = maps.laid_out(x, *grads)
    gradients: dict[str, Tensor | None] = {}
    through_norm = wanted.x or wanted.weight or wanted.bias
    sums = None
    if wanted.norm_weight or wanted.norm_bias or (through_norm and batch):
        launch, partial = norm_plan.plan_backward(grad, pre, *norm, None, True, True, eps, activation)
        run(launch, x.device)
        sums = [x.new_empty(weight.shape[0], dtype=torch.float32) for _ in range(2)]
        run(norm_plan.plan_finish(partial, variance, call.norm_weight, None, None, *sums, eps), x.device)
        gradients["norm_weight"], gradients["norm_bias"] = sums
    if not through_norm:
        return gradients
    sizes = maps.Sizes.of(x)
    elements = sizes.images * sizes.pixels
    if not batch:
        sums = None  # running statistics are constants
    elif call.group is not None:
        sums, elements = mean_of(sums, count, call.group), 1
    grad_pre = torch.empty_like(pre)
    launch, partial = plan.plan_backward_activation(
        grad, pre, activation, *norm, sums, elements, grad_pre, wanted.bias, eps
    )
    run(launch, x.device)
    if wanted.x:
        gradients["x"] = input_gradient(grad_pre, weight, x)
    if wanted.weight:
        gradients["weight"] = weight_gradient(grad_pre, weight, x).view(shape)
    if wanted.bias:
        gradients["bias"] = partial.sum(0)
    return gradients


def _products(call: Call) -> int:
    """2 · pixels · Cout · C/groups: W x at every pixel."""
    return 2 * (call.x.numel() // call.x.shape[1]) * call.weight.numel()


op = define(
    "channel_mix",
    Call,
    _outputs,
    _forward,
    _backward,
    _products,
    beside=4,
    passed_on=("residual",),
)
