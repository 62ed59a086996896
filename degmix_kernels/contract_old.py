"""The record every op keeps about itself; contract tests, the compile check and benchmarks read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from degmix_kernels.contract import Sample, Work
from degmix_kernels.launch import Launch


@dataclass(frozen=True)
class Cost:
    """What :class:`Work` is counted from; ``arguments`` are a call's, by name.

    Attributes:
        output: ``output(arguments)`` is the shape of the result, whose dtype is that of the first
            differentiable argument.
        products: ``products(arguments)`` counts the FLOPs of the forward pass's matrix products.
        backward_products: FLOPs of the backward pass's products over those of the forward pass: two for a
            product whose factors both have a gradient; five halves for attention, whose weights have to be
            computed again.
        backward_reads: names of the arguments without which there are no gradients.
        passed_on: names of the arguments whose gradient is the result's, the same tensor: not written again.
    """

    output: Callable[[Mapping[str, Any]], tuple[int, ...]]
    products: Callable[[Mapping[str, Any]], int]
    backward_products: float
    backward_reads: tuple[str, ...]
    passed_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Op:
    """One op, in its four faces, with what the shared tests need to know.

    Attributes:
        name: the public function's name.
        function: the public function: dispatches between Triton and the reference, has autograd.
        reference: the definition in plain PyTorch, with the function's own arguments; exact in fp64.
        module: the ``nn.Module`` around the function.
        samples: ``samples(device, dtype, generator)`` makes the calls that the contract tests run, ragged,
            1-sized and empty shapes included. Tensors are drawn in fp32 from the (CPU) generator, then
            cast, so that one seed gives the same values at every dtype.
        differentiable: names of the arguments that have gradients, where given and floating-point; the one
            that gives the result its dtype is the first.
        cost: the least a call can cost: what benchmarks count the speed of light from.
        batched: names of the tensors whose first axis is the batch.
        keeps_layout_of: the 4-D argument whose channels_last layout the output keeps, if there is one.
        autocast: names of the arguments cast to the autocast dtype; the output has that dtype too.
        kernels: ``kernels(dtype)`` plans every Triton launch of the op on meta tensors, with the runtime's
            own heuristic; None while the op has only its reference.
        variant: which of the function's kernels the samples run, if it has several sets of them: each set is
            then an entry of its own.
    """

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    module: type[nn.Module]
    samples: Callable[[torch.device, torch.dtype, torch.Generator], list[Sample]]
    differentiable: tuple[str, ...]
    cost: Cost
    batched: tuple[str, ...] = ()
    keeps_layout_of: str | None = None
    autocast: tuple[str, ...] = ()
    kernels: Callable[[torch.dtype], Sequence[Launch]] | None = None
    variant: str = ""

    @property
    def label(self) -> str:
        """Name and variant, as reports and test names show them."""
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def forward_work(self, arguments: Mapping[str, Any]) -> Work:
        """Least work of a call: every tensor read once, the result written once."""
        read = sum(_bytes(value) for value in arguments.values())
        return Work(read + self._output_bytes(arguments), self.cost.products(arguments))

    def backward_work(self, arguments: Mapping[str, Any]) -> Work:
        """Least work of all gradients: the result's and the arguments they need read, new ones written."""
        read = sum(_bytes(arguments.get(name)) for name in self.cost.backward_reads)
        new = (name for name in self.differentiable if name not in self.cost.passed_on)
        written = sum(_bytes(arguments.get(name)) for name in new)
        flops = round(self.cost.products(arguments) * self.cost.backward_products)
        return Work(self._output_bytes(arguments) + read + written, flops)

    def _output_bytes(self, arguments: Mapping[str, Any]) -> int:
        return math.prod(self.cost.output(arguments)) * arguments[self.differentiable[0]].element_size()


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
