"""The record every op keeps about itself; contract tests, the compile check and benchmarks read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from degmix_kernels.define import define


@dataclass(frozen=True)
class Sample:
    """One call of an op.

    Attributes:
        arguments: argument name → value; the op is called as ``function(**arguments)``.
        reduction: length of the longest sum behind one element of the output or of any gradient; the
            tolerance of :func:`degmix_kernels.testing.tolerance` follows from it. Where sums follow upon
            sums, their lengths are added, as the variances of independent rounding errors are: a product of
            lengths would let wrong results pass.
        roots: name of an argument → power of the one reciprocal square root that is a factor of all elements
            of its gradient.
        terms: ``terms(arguments, grad)`` are, by names of arguments, the terms of gradients in which terms
            cancel, so that these are, or may be, about zero.
    """

    arguments: dict[str, Any]
    reduction: int
    roots: Mapping[str, int] = field(default_factory=dict)
    terms: Callable[[Mapping[str, Any], Tensor], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Work:
    """Least work of one pass of one call.

    Attributes:
        bytes: moved between memory and chip, with everything read once and written once.
        flops: of the matrix products only, two per multiply-add.
    """

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Shape:
    """A call whose launches the compile check compiles: in inference, in training, and backward.

    Attributes:
        arguments: argument name → value; tensors are made where none has memory, inside ``FakeTensorMode``.
        deterministic: whether under ``torch.use_deterministic_algorithms(True)``.
    """

    arguments: dict[str, Any]
    deterministic: bool = False


@dataclass(frozen=True)
class Op:
    """One op, in its four faces, with what the shared tests, the compile check and benchmarks need to know.

    Attributes:
        op: its definition, see :mod:`degmix_kernels.define`.
        function: the public function: dispatches between Triton and the reference, has autograd.
        reference: the definition in plain PyTorch, with the function's own arguments; exact in fp64.
        module: the ``nn.Module`` around the function.
        samples: ``samples(device, dtype, generator)`` makes the calls that the contract tests run, ragged,
            1-sized and empty shapes included. Tensors are drawn in fp32 from the (CPU) generator, then
            cast, so that one seed gives the same values at every dtype.
        shapes: ``shapes(dtype)`` makes the calls whose launches the compile check compiles.
        batched: names of the tensors whose first axis is the batch.
        backward_reads: names of the arguments without which there are no gradients.
        output: ``output(arguments)`` is the shape of the result, by default that of the first argument. Its
            dtype is that of the first argument.
        keeps_layout_of: the 4-D argument whose channels_last layout the output keeps, if there is one.
        variant: which of the function's kernels the samples run, if it has several sets of them: each set is
            then an entry of its own.
    """

    op: define
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    module: type[nn.Module]
    samples: Callable[[torch.device, torch.dtype, torch.Generator], list[Sample]]
    shapes: Callable[[torch.dtype], Iterable[Shape]]
    batched: tuple[str, ...]
    backward_reads: tuple[str, ...]
    output: Callable[[Mapping[str, Any]], tuple[int, ...]] | None = None
    keeps_layout_of: str | None = None
    variant: str = ""

    @property
    def name(self) -> str:
        """The public function's name."""
        return self.op.name

    @property
    def label(self) -> str:
        """Name and variant, as reports and test names show them."""
        return f"{self.name} ({self.variant})" if self.variant else self.name

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the arguments that have gradients, where given; the first gives the result its dtype."""
        return self.op.differentiable

    @property
    def autocast(self) -> tuple[str, ...]:
        """Names of the arguments that are cast to the autocast dtype; the result has that dtype, too."""
        return self.op.autocast

    def forward_work(self, arguments: Mapping[str, Any]) -> Work:
        """Least work of a call: every tensor read once, the result written once."""
        read = sum(_bytes(value) for value in arguments.values())
        return Work(read + self._output_bytes(arguments), self._products(arguments))

    def backward_work(self, arguments: Mapping[str, Any]) -> Work:
        """Least work of all gradients: the result's and the arguments they need read, new ones written."""
        read = sum(_bytes(arguments.get(name)) for name in self.backward_reads)
        new = (name for name in self.differentiable if name not in self.op.passed_on)
        written = sum(_bytes(arguments.get(name)) for name in new)
        flops = round(self._products(arguments) * self.op.backward_products)
        return Work(self._output_bytes(arguments) + read + written, flops)

    def _products(self, arguments: Mapping[str, Any]) -> int:
        return self.op.products(SimpleNamespace(**arguments))

    def output_shape(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of a call's result."""
        return (
            tuple(arguments[self.differentiable[0]].shape) if self.output is None else self.output(arguments)
        )

    def _output_bytes(self, arguments: Mapping[str, Any]) -> int:
        return math.prod(self.output_shape(arguments)) * arguments[self.differentiable[0]].element_size()


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
