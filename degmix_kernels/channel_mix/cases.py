"""Calls of ``channel_mix``: what the contract tests run, what the compile check compiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from degmix_kernels.activation import activate
from degmix_kernels.batch_norm.reference import batch_norm
from degmix_kernels.channel_mix import reference
from degmix_kernels.channel_mix.module import ChannelMix
from degmix_kernels.channel_mix.op import channel_mix, op
from degmix_kernels.contract import Op, Sample, Shape

# shape of x, out_channels, groups, activation, bias, training, norm parameters, residual
_CALLS = (
    ((2, 5, 6, 9), 7, 1, "gelu", True, False, True, True),
    ((3, 7, 4, 5), 6, 1, "gelu", True, True, True, True),
    ((1, 17, 5, 3), 3, 1, "gelu", False, False, True, False),
    ((2, 6, 3, 5), 9, 3, "gelu", True, True, True, True),
    ((9, 4, 1, 1), 6, 2, "relu", True, True, False, False),
    ((29, 11), 5, 1, "silu", True, True, True, True),
    ((1, 1, 1, 1), 1, 1, "identity", True, False, True, True),
    ((0, 4, 3, 5), 2, 1, "gelu", True, False, True, True),
    ((2, 4, 0, 6), 6, 2, "relu", True, True, False, True),
)


def _terms_of_training(arguments: Mapping[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """What each pixel adds to the gradients of weight and bias while the batch's statistics are constants.

    That these are not takes two parts out of it: the mean, and all that would only scale an output channel.
    The two are nearly everything where an activation is linear in all pixels of a channel, or zero in most.
    """
    doubles = {
        name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()
    }
    x, weight, bias, activation = (doubles[name] for name in ("x", "weight", "bias", "activation"))
    mixed = reference.mix_and_activate(x, weight, bias, "identity").detach().requires_grad_()
    activated, eps = activate(mixed, activation), 1e-5
    _, mean, variance = reference.normalize(activated.detach(), None, None, eps)
    output = batch_norm(activated, mean, variance, doubles["norm_weight"], None, None, eps)
    (of_bias,) = torch.autograd.grad(output, mixed, grad.double())
    groups = x.shape[1] // weight.shape[1]
    of_weight = of_bias.unflatten(1, (groups, -1)).unsqueeze(3) * x.unflatten(1, (groups, -1)).unsqueeze(2)
    return {"weight": of_weight, "bias": of_bias}


def _samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    samples = []
    for shape, out, groups, activation, bias, training, affine, residual in _CALLS:
        arguments = {
            "x": draw(*shape) * 4,  # wide: small z make the activation linear, see above
            "weight": draw(out, shape[1] // groups, *[1] * (len(shape) - 2)) / shape[1] ** 0.5,
            "bias": draw(out) if bias else None,
            "activation": activation,
            # In training no running statistics: a call would update them and so change the next one.
            "running_mean": None if training else draw(out),
            "running_var": None if training else draw(out).square() + 0.5,
            "norm_weight": draw(out) if affine else None,
            "norm_bias": draw(out) if affine else None,
            "training": training,
            "residual": draw(shape[0], out, *shape[2:]) if residual else None,
        }
        elements = shape[0] * (shape[2] * shape[3] if len(shape) == 4 else 1)
        # In succession: over channels in and, backward, channels out; over pixels of the statistics.
        terms = _terms_of_training if training else None
        samples.append(Sample(arguments, shape[1] + out + elements, terms=terms))
    return samples


def _shapes(dtype: torch.dtype) -> Iterator[Shape]:
    """DeGMix on NYUD-v2 in both layouts, four tasks side by side, ragged sizes, more than 2³¹ elements."""
    # shape of x, channels last, groups, out channels
    calls = [((8, 256, 107, 140), False, 1, 256)]
    if dtype != torch.float16:  # the code of bf16 but for conversions
        calls += [((8, 256, 107, 140), True, 1, 256), ((8, 1024, 107, 140), False, 4, 1024)]
    if dtype == torch.bfloat16:
        calls += [
            ((2, 50, 7, 7), False, 1, 27),
            ((3, 256, 2048, 2048), True, 1, 256),
            # Statistics of one part: all of its counts are 1, and reach the kernel as constants.
            ((1, 50, 7, 7), False, 1, 27),
        ]
    for (shape, last, groups, out), training in itertools.product(calls, (False, True)):
        layout = torch.channels_last if last else torch.contiguous_format
        vectors = ("running_mean", "running_var", "norm_weight", "norm_bias")
        arguments = {
            "x": torch.empty(shape, dtype=dtype, memory_format=layout),
            "weight": torch.empty(out, shape[1] // groups, dtype=dtype),
            "bias": torch.empty(out, dtype=dtype),
            **{name: torch.empty(out) for name in vectors},
            "residual": torch.empty(shape[0], out, *shape[2:], dtype=dtype, memory_format=layout),
            "training": training,
        }
        yield Shape(arguments)


def _output(arguments: Mapping[str, Any]) -> tuple[int, ...]:
    x = arguments["x"]
    return (x.shape[0], arguments["weight"].shape[0], *x.shape[2:])


OPS = (
    Op(
        op=op,
        function=channel_mix,
        reference=reference.channel_mix,
        module=ChannelMix,
        samples=_samples,
        shapes=_shapes,
        batched=("x", "residual"),
        # With the bias, the batch's statistics and z, which is not an argument, can be computed again.
        backward_reads=("x", "weight", "bias", "running_mean", "running_var", "norm_weight"),
        output=_output,
        keeps_layout_of="x",
    ),
)
