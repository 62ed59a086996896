"""What tests of all ops share: calls of the registry, fresh arguments, comparison with the reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from degmix_kernels.backend import KERNEL_DTYPES
from degmix_kernels.contract import Op, Sample
from degmix_kernels.registry import OPS
from degmix_kernels.testing import assert_close

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.label)
every_dtype = pytest.mark.parametrize(
    "dtype", KERNEL_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def environment_without_interpreter() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def samples(op: Op, device: torch.device, dtype: torch.dtype) -> list[Sample]:
    return op.samples(device, dtype, torch.Generator().manual_seed(0))


def first(op: Op, device: torch.device, dtype: torch.dtype = torch.float32) -> Sample:
    return samples(op, device, dtype)[0]


def fresh(
    op: Op, arguments: dict, wanted: tuple[str, ...] | None = None, dtype: torch.dtype | None = None
) -> dict:
    """Copies of the arguments (ops may update buffers); the wanted differentiable ones require a gradient."""
    copies = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = value.detach().clone(memory_format=torch.preserve_format)
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            if name in (op.differentiable if wanted is None else wanted):
                value.requires_grad_()
        copies[name] = value
    return copies


def differentiated(op: Op, arguments: dict) -> list[str]:
    return [name for name in op.differentiable if isinstance(arguments.get(name), Tensor)]


def check(op: Op, sample: Sample, arguments: dict, output: Tensor, grad: Tensor, dtype: torch.dtype) -> None:
    """Compare an output, and the gradients that ``grad`` gives, with the fp64 reference."""
    exact = fresh(op, sample.arguments, dtype=torch.float64)
    with torch.autocast(output.device.type, enabled=False):
        expected = op.reference(**exact)
    assert_close(output, expected, sample.reduction, dtype)
    names = [name for name in differentiated(op, arguments) if arguments[name].requires_grad]
    actual = torch.autograd.grad(output, [arguments[name] for name in names], grad)
    wanted = torch.autograd.grad(expected, [exact[name] for name in names], grad.double())
    terms = sample.terms(sample.arguments, grad) if sample.terms else {}
    for name, gradient, reference in zip(names, actual, wanted, strict=True):
        assert gradient.dtype == arguments[name].dtype
        assert_close(
            gradient,
            reference,
            sample.reduction,
            dtype,
            f"gradient of {name}",
            roots=sample.roots.get(name, 0),
            terms=terms.get(name),
        )


def random_like(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(output)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
