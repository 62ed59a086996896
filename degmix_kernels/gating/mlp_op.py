"""The gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from degmix_kernels import backend, checks, maps
from degmix_kernels.define import NotNegative, OwnDtype, define
from degmix_kernels.gating import reference
from degmix_kernels.gating.unit_op import Mode
from degmix_kernels.launch import run

if backend.HAS_TRITON:
    from degmix_kernels.gating.backward_plan import plan_norm_backward
    from degmix_kernels.gating.passes import (
        Norm,
        Wants,
        flat,
        gate_backward,
        gate_forward,
        normalised,
        statistics_for,
    )
    from degmix_kernels.gating.plan import plan_linear


class Call(NamedTuple):
    """Arguments of :func:`gated_mlp`, and whether to keep anything for a backward pass."""

    x: Tensor
    norm_weight: OwnDtype
    norm_bias: OwnDtype
    fc1_weight: Tensor
    fc1_bias: Tensor
    gate_norm_weight: OwnDtype
    gate_norm_bias: OwnDtype
    gate_weight: Tensor
    gate_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    mode: Mode
    eps: NotNegative
    recompute: bool
    keep: bool

    @property
    def keeps_pre(self) -> bool:
        """Whether to keep what fc1 gives, before its activation."""
        return self.keep and not self.recompute

    @property
    def norm(self) -> Norm:
        """Weight, bias and eps of x's LayerNorm."""
        return self.norm_weight, self.norm_bias, self.eps

    @property
    def gate(self) -> tuple[Norm, Tensor, Tensor, str]:
        """The gate's arguments after u and v, as ``gate_forward`` takes them."""
        norm = (self.gate_norm_weight, self.gate_norm_bias, self.eps)
        return norm, self.gate_weight, self.gate_bias, self.mode


def gated_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    gate_norm_weight: Tensor,
    gate_norm_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    mode: str = "channel",
    eps: float = 1e-5,
    recompute: bool = False,
) -> Tensor:
    """A gated MLP with its residual: ``x + fc2(SGU(split(GELU(fc1(LayerNorm(x))))))``.

    GELU is exact.

    Under autocast ``x`` and the weights and biases of fc1, fc2 and the gate are cast to the autocast dtype,
    which the result has; the LayerNorms' parameters keep their dtype; doubles are left alone.

    Args:
        x: (B, N, C), floating point.
        norm_weight: (C,), scale of the first LayerNorm.
        norm_bias: (C,), its shift.
        fc1_weight: (2·hidden, C).
        fc1_bias: (2·hidden,).
        gate_norm_weight: (hidden,), scale of the gate's LayerNorm.
        gate_norm_bias: (hidden,), its shift.
        gate_weight: (hidden, hidden) in mode ``"channel"``, (N, N) in mode ``"token"``.
        gate_bias: (hidden,) or (N,).
        fc2_weight: (C, hidden).
        fc2_bias: (C,).
        mode: as in :func:`degmix_kernels.spatial_gating_unit`.
        eps: added to both LayerNorms' variances.
        recompute: keep nothing but the arguments for the backward pass, not the (B, N, 2·hidden) tensor
            before the GELU, which the backward pass then computes again.

    Returns:
        (B, N, C), in the dtype of ``x``.

    Raises:
        TypeError: for a wrong type, dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Liu et al., arXiv 2105.08050, section 2 (tokens); DeGMix, arXiv 2308.05721, gating (channels).
    """
    call = op.checked(
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, gate_norm_weight, gate_norm_bias, gate_weight,
        gate_bias, fc2_weight, fc2_bias, mode, eps, recompute, True,
    )  # fmt: skip
    x = call.x
    checks.expect(x.dim() == 3, "x", "3 dimensions", x.shape)
    _, tokens, channels = x.shape
    checks.expect(channels > 0, "x", "at least one channel", x.shape)
    checks.expect(call.fc1_weight.dim() == 2, "fc1_weight", "2 dimensions", call.fc1_weight.shape)
    rows = call.fc1_weight.shape[0]
    checks.expect(rows > 0 and rows % 2 == 0, "fc1_weight", "2·hidden rows", call.fc1_weight.shape)
    hidden = rows // 2
    size = hidden if call.mode == "channel" else tokens
    shapes = {
        "fc1_weight": (rows, channels),
        "fc1_bias": (rows,),
        "fc2_weight": (channels, hidden),
        "fc2_bias": (channels,),
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "gate_norm_weight": (hidden,),
        "gate_norm_bias": (hidden,),
        "gate_weight": (size, size),
        "gate_bias": (size,),
    }
    for name, shape in shapes.items():
        checks.expect_shape(name, getattr(call, name), shape)
    if op.runs_triton(call):
        return op(call)[0]
    # Transforms of torch.func refuse the hooks that checkpointing needs.
    if call.recompute and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return checkpoint(reference.gated_mlp, *tuple(call)[:13], use_reentrant=False)
    return reference.gated_mlp(*tuple(call)[:13])


def _contiguous(call: Call) -> Call:
    return Call(*maps.contiguous(*call[:11]), *call[11:])


def _outputs(call: Call) -> tuple[Tensor, Tensor]:
    """The result, and what fc1 gives, empty if not to be kept."""
    x = call.x
    pre = x.new_empty((*x.shape[:2], call.fc1_weight.shape[0]) if call.keeps_pre else 0)
    return maps.empty_like(x), pre


def _forward(call: Call, output: Tensor, pre: Tensor) -> None:
    call = _contiguous(call)
    x = call.x
    hidden = x.new_empty((*x.shape[:2], call.fc1_weight.shape[0]))
    _run_fc1(call, "gelu", pre if call.keeps_pre else None, hidden)
    u, v = hidden.chunk(2, dim=2)
    gate_forward(u, v, *call.gate, None)  # into u
    run(plan_linear(u, call.fc2_weight, call.fc2_bias, residual=x, output=output), x.device)


def _run_fc1(call: Call, activation: str, pre: Tensor | None, output: Tensor | None) -> None:
    """Fill what is given: fc1's result, and the same before the activation."""
    x, norm = call.x, call.norm
    statistics = statistics_for(x, norm, call.fc1_weight.shape[0])
    fc1 = (call.fc1_weight, call.fc1_bias)
    run(plan_linear(x, *fc1, norm, statistics, activation, pre=pre, output=output), x.device)


def _backward(
    call: Call, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Call
) -> dict[str, Tensor | None]:
    call, grad = _contiguous(call), grads[0].contiguous()
    x = call.x
    of_norm = wanted.norm_weight or wanted.norm_bias
    through_norm = wanted.x or of_norm
    through_fc1 = through_norm or wanted.fc1_weight or wanted.fc1_bias
    gradients: dict[str, Tensor | None] = {}
    if through_fc1 or any(wanted[5:10]):  # from the gate's LayerNorm to fc2's weight
        pre = kept[0]
        if call.recompute:
            pre = x.new_empty((*x.shape[:2], call.fc1_weight.shape[0]))
            _run_fc1(call, "identity", pre, None)
        grad_pre = torch.empty_like(pre) if through_fc1 else None
        found = _through_gate(call, grad, pre, grad_pre, wanted)
        gated = found.pop("gated")
        gradients = {f"gate_{name}": gradient for name, gradient in found.items()}
        if wanted.fc1_bias:
            gradients["fc1_bias"] = torch.cat([found["u_sum"], found["v_sum"]])
        if wanted.fc2_weight:
            gradients["fc2_weight"] = flat(grad).t() @ flat(gated)
        del gated
    normed = sums = None
    if through_norm:
        grad_normed = (flat(grad_pre) @ call.fc1_weight).view(x.shape)
        gradients["x"] = torch.empty_like(x) if wanted.x else None
        normed = torch.empty_like(x) if wanted.fc1_weight else None
        launches, sums = plan_norm_backward(
            grad_normed, x, call.norm, "identity", grad, gradients["x"], normed, of_norm or wanted.fc2_bias
        )
        for launch in launches:
            run(launch, x.device)
        if of_norm:
            gradients["norm_weight"], gradients["norm_bias"] = sums[0].sum(0), sums[1].sum(0)
    elif wanted.fc1_weight:
        normed = normalised(x, call.norm, "identity")
    if wanted.fc1_weight:
        gradients["fc1_weight"] = flat(grad_pre).t() @ flat(normed)
    if wanted.fc2_bias:  # the sum of the residual's gradient
        gradients["fc2_bias"] = flat(grad).sum(0, dtype=torch.float32) if sums is None else sums[2].sum(0)
    return gradients


def _through_gate(
    call: Call, grad: Tensor, pre: Tensor, grad_pre: Tensor | None, wanted: Call
) -> dict[str, Tensor | None]:
    """The way back through fc2, the gate and fc1's activation; ``grad_pre`` is filled, if given."""
    wants = Wants(
        norm=wanted.gate_norm_weight or wanted.gate_norm_bias,
        weight=wanted.gate_weight,
        bias=wanted.gate_bias,
        gated=wanted.fc2_weight,
        sums=wanted.fc1_bias,
    )
    u, v = pre.chunk(2, dim=2)
    grad_u, grad_v = (None, None) if grad_pre is None else grad_pre.chunk(2, dim=2)
    grad_gated = None
    if grad_pre is not None or wants.norm or wants.weight or wants.bias:
        grad_gated = (flat(grad) @ call.fc2_weight).view(u.shape)
    return gate_backward(grad_gated, u, v, *call.gate, "gelu", wants, grad_u, grad_v)


def _products(call: Call) -> int:
    """The gate's; fc1, 2 · tokens · C · 2 hidden, and fc2, 2 · tokens · hidden · C."""
    channels, hidden = call.fc2_weight.shape
    tokens = call.x.shape[0] * call.x.shape[1]
    return 2 * tokens * hidden * call.gate_weight.shape[0] + 6 * tokens * channels * hidden


op = define("gated_mlp", Call, _outputs, _forward, _backward, _products, beside=1)
