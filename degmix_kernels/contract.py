"""The record every op keeps about itself; contract tests, the compile check and benchmarks read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from degmix_kernels.launch import Launch


@dataclass(frozen=True)
class Sample:
    """One call of an op.

    Attributes:
        arguments: argument name → value; the op is called as ``function(**arguments)``.
        reduction: length of the longest sum behind one element of the output or of any gradient;
            the tolerance of :func:`degmix_kernels.testing.tolerance` follows from it.
    """

    arguments: dict[str, Any]
    reduction: int


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
        differentiable: names of the arguments that have gradients, where given and floating-point.
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
    batched: tuple[str, ...] = ()
    keeps_layout_of: str | None = None
    autocast: tuple[str, ...] = ()
    kernels: Callable[[torch.dtype], Sequence[Launch]] | None = None
    variant: str = ""

    @property
    def label(self) -> str:
        """Name and variant, as reports and test names show them."""
        return f"{self.name} ({self.variant})" if self.variant else self.name
