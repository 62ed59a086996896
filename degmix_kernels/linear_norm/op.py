"""Linear and LayerNorm in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from degmix_kernels import backend, checks, maps
from degmix_kernels.define import NotNegative, OwnDtype, define
from degmix_kernels.launch import run
from degmix_kernels.linear_norm import reference
from degmix_kernels.product import input_gradient, weight_gradient

if backend.HAS_TRITON:
    from degmix_kernels.linear_norm import plan

# A row is normalised where it is computed, so one program computes all of it, in registers.
MAX_CHANNELS = 512


class Call(NamedTuple):
    """Arguments of :func:`linear_norm`, and whether to keep what a backward pass reads."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: OwnDtype
    norm_bias: OwnDtype
    addend: Tensor | None
    residual: Tensor | None
    eps: NotNegative
    keep: bool


def linear_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """A Linear, normalised over its channels: ``LayerNorm(W x + b + addend) + residual``.

    Tokens may belong to G blocks, such as tasks, each with parameters of its own.

    The Triton kernels take up to 512 out channels; more run the reference.

    Under autocast ``x``, ``weight``, ``bias``, ``addend`` and ``residual`` are cast to the autocast dtype and
    the result has it; the LayerNorm's parameters keep their dtype; doubles are left alone.

    Args:
        x: (B, N, C) tokens, or a map (B, C, H, W), channels_last in, channels_last out; floating point.
        weight: (Cout, C); or, for tokens, (G, Cout, C): the first B/G sequences are multiplied with the first
            matrix, the next with the second, and so on. G divides B.
        bias: (Cout,), or (G, Cout) with G weights, as all vectors.
        norm_weight: (Cout,), the LayerNorm's scale.
        norm_bias: (Cout,), its shift.
        addend: shaped as the result, added before the normalisation.
        residual: shaped as the result, added after it.
        eps: added to the variance.

    Returns:
        (B, N, Cout) or (B, Cout, H, W), in the dtype of ``x``.

    Raises:
        TypeError: for a wrong type, dtype or device.
        ValueError: for a wrong shape or value.
        RuntimeError: if the Triton backend is forced and cannot run.

    Follows Ba et al., arXiv 1607.06450, equations 3 and 4, behind a linear layer; DeGMix, arXiv 2308.05721,
    ends its attention blocks so.
    """
    call = op.checked(x, weight, bias, norm_weight, norm_bias, addend, residual, eps, True)
    x, weight = call.x, call.weight
    checks.expect(x.dim() in (3, 4), "x", "3 or 4 dimensions", x.shape)
    checks.expect(weight.dim() in (2, 3), "weight", "2 or 3 dimensions", weight.shape)
    checks.expect(weight.dim() == 2 or x.dim() == 3, "weight", "2 dimensions for a map", weight.shape)
    checks.expect(min(weight.shape) > 0, "weight", "no empty dimension", weight.shape)
    *blocks, out_channels, _ = weight.shape
    checks.expect_shape("weight", weight, (*blocks, out_channels, x.shape[1 if x.dim() == 4 else 2]))
    divides = not blocks or x.shape[0] % blocks[0] == 0
    checks.expect(divides, "weight", "a first dimension that divides the batch of x", weight.shape)
    for name in Call._fields[2:5]:
        checks.expect_shape(name, getattr(call, name), (*blocks, out_channels))
    shape = result_shape(x, out_channels)
    checks.expect_shape("addend", call.addend, shape)
    checks.expect_shape("residual", call.residual, shape)
    missing = f"more than {MAX_CHANNELS} out channels" if out_channels > MAX_CHANNELS else ""
    if op.runs_triton(call, missing):
        return op(call)[0]
    return maps.laid_out(x, reference.linear_norm(*tuple(call)[:8]))[0]


def result_shape(x: Tensor, out_channels: int) -> tuple[int, ...]:
    """(B, Cout, H, W) of a map, (B, N, Cout) of tokens."""
    return (x.shape[0], out_channels, *x.shape[2:]) if x.dim() == 4 else (*x.shape[:2], out_channels)


def _outputs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The result, x̂, and 1 / √(variance + eps) of every pixel. The last two are empty if not to be kept."""
    x, out_channels = call.x, call.weight.shape[-2]
    shape, layout = result_shape(x, out_channels), maps.memory_format(x)
    output = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    normed = torch.empty_like(output) if call.keep else x.new_empty(0)
    pixels = output.numel() // out_channels if call.keep else 0
    return output, normed, x.new_empty(pixels, dtype=torch.float32)


def _forward(call: Call, output: Tensor, normed: Tensor, deviation: Tensor) -> None:
    x, weight, bias, norm_weight, norm_bias, addend, residual, eps, keep = call
    weight = _parameter(weight, 2)
    vectors = (_parameter(vector, 1) for vector in (bias, norm_weight, norm_bias))
    kept = (normed, deviation) if keep else (None, None)
    addend, residual, filled, normed = (
        _rows(each, x, len(weight)) for each in (addend, residual, output, kept[0])
    )
    rows = _rows(x, x, len(weight))
    launch = plan.plan_forward(rows, weight, *vectors, addend, residual, filled, normed, kept[1], eps)
    run(launch, output.device)


def _backward(
    call: Call, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Call
) -> dict[str, Tensor | None]:
    x, weight = call[:2]
    norm_weight = _parameter(call.norm_weight, 1)
    grad, normed, rows = (_rows(each, x, len(norm_weight)) for each in (grads[0], kept[0], x))
    inner = torch.empty_like(normed) if any(wanted[:3]) or wanted.addend else None
    launch, sums = plan.plan_backward(grad, normed, kept[1], norm_weight, inner)
    run(launch, x.device)
    gradients = {}
    if wanted.x:
        gradients["x"] = (
            input_gradient(inner, weight, rows)
            if x.dim() == 4
            else torch.bmm(inner, _parameter(weight, 2)).view(x.shape)
        )
    if wanted.weight:
        gradients["weight"] = (
            weight_gradient(inner, weight, rows)
            if x.dim() == 4
            else torch.bmm(inner.mT, rows).view(weight.shape)
        )
    for name, parts in zip(("norm_weight", "norm_bias", "bias"), sums, strict=True):
        if getattr(wanted, name):
            gradients[name] = parts.sum(1).view(weight.shape[:-1])
    if wanted.addend:
        gradients["addend"] = inner.view(grads[0].shape)
    return gradients


def _rows(tensor: Tensor | None, x: Tensor, blocks: int) -> Tensor | None:
    """Tokens as (blocks, tokens, channels); maps laid out as x, or contiguous if it is in neither layout."""
    if tensor is None:
        return None
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=maps.memory_format(x))
    batch, tokens, channels = tensor.shape
    return tensor.reshape(blocks, batch // blocks * tokens, channels).contiguous()


def _parameter(parameter: Tensor | None, dims: int) -> Tensor | None:
    """A parameter of ``dims`` dimensions for one block, contiguous, with an axis for blocks in front."""
    if parameter is None:
        return None
    parameter = parameter.contiguous()
    return parameter if parameter.dim() > dims else parameter[None]


def _products(call: Call) -> int:
    """2 · pixels · Cout · C: W x at every pixel."""
    *_, out_channels, channels = call.weight.shape
    return 2 * (call.x.numel() // channels) * out_channels * channels


op = define(
    "linear_norm",
    Call,
    _outputs,
    _forward,
    _backward,
    products=_products,
    beside=2,
    passed_on=("residual",),
    unsaved=("addend",),
)
