"""What tests of all ops share: calls of the registry, fresh arguments, comparison with the reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from degmix_kernels import use_backend
from degmix_kernels.backend import KERNEL_DTYPES
from degmix_kernels.contract import Op, Sample
from degmix_kernels.registry import OPS
from degmix_kernels.testing import assert_close, poisoned_empty


def samples(op: Op, device: torch.device, dtype: torch.dtype) -> list[Sample]:
    return op.samples(device, dtype, torch.Generator().manual_seed(0))


def first(op: Op, device: torch.device, dtype: torch.dtype = torch.float32) -> Sample:
    return samples(op, device, dtype)[0]


every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.label)
_VARIANTS = sorted(OPS, key=lambda op: -op.forward_work(first(op, torch.device("cpu")).arguments).flops)
every_definition = pytest.mark.parametrize(
    "op", {op.name: op for op in _VARIANTS}.values(), ids=lambda op: op.label
)
"""The cheapest variant of each op; variants differ in their kernels."""
every_dtype = pytest.mark.parametrize(
    "dtype", KERNEL_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normally distributed numbers, the same in every dtype but for their rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves_of(tensors: Mapping[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Views of the tensors that there are, or copies in another dtype, which require gradients."""
    return {
        name: value.detach().to(dtype or value.dtype).requires_grad_()
        for name, value in tensors.items()
        if value is not None
    }


def result_and_gradients(
    function: Callable[..., Tensor],
    leaves: Mapping[str, Tensor],
    grad: Tensor | None = None,
    wanted: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:
    """The result, "output", and the gradient of every leaf, or of the wanted ones, by name."""
    output = function(**leaves)
    grad = draw(*output.shape, seed=99).to(output) if grad is None else grad.to(output)
    names = tuple(leaves) if wanted is None else wanted
    gradients = torch.autograd.grad(output, [leaves[name] for name in names], grad)
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def compare(
    function: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    tensors: Mapping[str, Tensor | None],
    reduction: int,
    grad: Tensor | None = None,
    wanted: tuple[str, ...] | None = None,
    of_gradients: int | None = None,
) -> dict[str, Tensor]:
    """Compare a result and its gradients with what a reference in fp64 makes of the same numbers.

    ``of_gradients`` is the gradients' reduction, where it is another.

    Returns:
        The result and the gradients that were compared. None has an element that was not written.
    """
    ours = leaves_of(tensors)
    with poisoned_empty():
        actual = result_and_gradients(function, ours, grad, wanted)
    with use_backend("reference"):
        exact = result_and_gradients(expected, leaves_of(tensors, torch.float64), grad, wanted)
    dtype = actual["output"].dtype
    assert dtype == next(iter(ours.values())).dtype
    for name, value in actual.items():
        assert name == "output" or value.dtype == ours[name].dtype
        terms = reduction if name == "output" else of_gradients or reduction
        assert_close(value, exact[name], terms, dtype, name)
    return actual


def environment_without_interpreter() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


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


@contextmanager
def saved_tensors() -> Iterator[dict[int, Tensor]]:
    """What calls inside save for their backward passes, by the address of its memory."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() > 0:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def random_like(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(output)


@contextmanager
def deterministic_algorithms(wanted: bool = True) -> Iterator[None]:
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
