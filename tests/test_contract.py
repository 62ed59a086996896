"""The rules that every op keeps, run over the registry: an op added there is tested here."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from contract import (
    check,
    deterministic_algorithms,
    differentiated,
    environment_without_interpreter,
    every_definition,
    every_dtype,
    every_op,
    first,
    fresh,
    random_like,
    samples,
    saved_tensors,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

import degmix_kernels
from degmix_kernels import use_backend
from degmix_kernels.backend import can_run
from degmix_kernels.contract import Op
from degmix_kernels.testing import assert_close, poisoned_empty


@every_op
def test_faces(op: Op) -> None:
    assert getattr(degmix_kernels, op.name) is op.function
    assert getattr(degmix_kernels, op.module.__name__) is op.module
    assert issubclass(op.module, nn.Module)
    assert op.function.__doc__
    assert op.batched


@every_op
@every_dtype
def test_values_and_gradients(op: Op, dtype: torch.dtype, device: torch.device) -> None:
    for sample in samples(op, device, dtype):
        arguments = fresh(op, sample.arguments)
        with poisoned_empty():
            output = op.function(**arguments)
            assert output.dtype == dtype
            check(op, sample, arguments, output, random_like(output), dtype)


@every_op
def test_reference_gradient_in_double(op: Op, device: torch.device) -> None:
    for sample in samples(op, device, torch.float64):
        arguments = fresh(op, sample.arguments)
        names = differentiated(op, arguments)
        if any(arguments[name].numel() == 0 for name in names):
            continue  # nothing to differentiate

        def call(*values: Tensor, arguments: dict = arguments, names: list[str] = names) -> Tensor:
            copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
            return op.reference(**copies | dict(zip(names, values, strict=True)))

        values = [arguments[name] for name in names]
        # On a GPU PyTorch adds some gradients up in any order; a CPU does not.
        assert torch.autograd.gradcheck(call, values, fast_mode=True, nondet_tol=1e-9)


def laid_out(op: Op, arguments: dict, layout: str) -> dict[str, Tensor]:
    """The arguments that the layout is tried on, in it."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    if layout == "strided":
        return {name: torch.stack([value, value], -1)[..., 0] for name, value in tensors.items()}
    if layout == "expanded":
        return {name: tensors[name][:1].expand_as(tensors[name]) for name in op.batched if name in tensors}
    name = op.keeps_layout_of
    return {name: tensors[name].contiguous(memory_format=torch.channels_last)} if name else {}


@every_op
@pytest.mark.parametrize("layout", ["strided", "expanded", "channels_last"])
def test_inputs_and_gradients_laid_out(op: Op, layout: str, device: torch.device) -> None:
    sample = first(op, device)
    changed = laid_out(op, sample.arguments, layout)
    if not changed:
        return
    sample = replace(sample, arguments=sample.arguments | changed)
    arguments = fresh(op, sample.arguments)
    for name, value in changed.items():
        assert value.numel() < 2 or not value.is_contiguous()
        arguments[name] = value.detach().requires_grad_(name in op.differentiable)
    with poisoned_empty():
        output = op.function(**arguments)
        grad = random_like(output)
        if layout == "strided":
            grad = torch.stack([grad, grad], -1)[..., 0]
        elif layout == "expanded":
            grad = torch.ones((), device=device).expand_as(output)  # as from output.sum()
        else:
            assert output.is_contiguous(memory_format=torch.channels_last)
            grad = grad.contiguous(memory_format=torch.channels_last)
        check(op, sample, arguments, output, grad, torch.float32)


@every_op
def test_gradients_one_at_a_time(op: Op, device: torch.device) -> None:
    sample = first(op, device)
    for name in differentiated(op, sample.arguments):
        arguments = fresh(op, sample.arguments, wanted=(name,))
        output = op.function(**arguments)
        check(op, sample, arguments, output, random_like(output), torch.float32)
    with torch.no_grad():
        assert not op.function(**fresh(op, sample.arguments)).requires_grad


@every_definition
def test_saves_arguments_and_what_is_declared(op: Op, device: torch.device) -> None:
    arguments = fresh(op, first(op, device).arguments)
    with saved_tensors() as saved:
        with torch.no_grad():
            op.function(**arguments)
        assert not saved
        output = op.function(**arguments)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    own = {value.untyped_storage().data_ptr(): name for name, value in tensors.items()}
    assert len(saved.keys() - own.keys()) <= op.op.kept
    assert not {own[each] for each in saved.keys() & own.keys()} & {*op.op.passed_on, *op.op.unsaved}
    # No tensor hides from the hooks on the node of the graph.
    assert not [name for name, value in vars(output.grad_fn).items() if isinstance(value, Tensor)]


class FakeResults(TorchDispatchMode):
    """Compares what registered ops return with what they tell compilers that they would, on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.compared = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.namespace == "degmix":
            gpu = torch.device("cuda", 0)  # which need not be there

            def there(value: Tensor) -> Tensor:
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=gpu)

            with FakeTensorMode():
                expected = function(*tree_map_only(Tensor, there, args), **(kwargs or {}))
            for result, fake in zip(tree_leaves(results), tree_leaves(expected), strict=True):
                found = fake.dtype, fake.shape, fake.device
                assert found == (result.dtype, result.shape, gpu), function
                assert result.numel() == 0 or result.stride() == fake.stride(), function
            self.compared += 1
        return results


@every_op
@pytest.mark.usefixtures("no_launches")
def test_compilers_are_told_the_truth(op: Op, device: torch.device) -> None:
    sample = first(op, device, torch.bfloat16)
    for wanted in [*([name] for name in differentiated(op, sample.arguments)), list(op.differentiable)]:
        arguments = fresh(op, sample.arguments, wanted=tuple(wanted))
        leaves = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
        with FakeResults() as mode:
            output = op.function(**arguments)
            torch.autograd.grad(output, leaves, random_like(output))
        assert mode.compared >= 1


@every_op
def test_nan_in_nan_out(op: Op, device: torch.device) -> None:
    for name in differentiated(op, first(op, device).arguments):
        arguments = fresh(op, first(op, device).arguments, wanted=())
        arguments[name].fill_(torch.nan)
        assert op.function(**arguments).isnan().any(), name


@every_definition
def test_compiles_once_for_every_batch_size(op: Op, device: torch.device) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.function, fullgraph=True, backend=counter)
    sample = first(op, device)
    for repeats in (2, 3):
        arguments = dict(sample.arguments)
        for name in op.batched:
            if isinstance(arguments[name], Tensor):
                arguments[name] = torch.cat([arguments[name]] * repeats)
        repeated = replace(sample, arguments=arguments, reduction=sample.reduction * repeats)
        arguments = fresh(op, arguments)
        for name in op.batched:
            if isinstance(arguments[name], Tensor):
                torch._dynamo.mark_dynamic(arguments[name], 0)
        output = compiled(**arguments)
        check(op, repeated, arguments, output, random_like(output), torch.float32)
    assert counter.frame_count == 1


@every_definition
def test_autocast(op: Op, device: torch.device) -> None:
    sample = first(op, device)
    arguments = fresh(op, sample.arguments)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output = op.function(**arguments)
        doubles = op.function(**fresh(op, sample.arguments, dtype=torch.float64))
    assert output.dtype == torch.bfloat16
    assert doubles.dtype == torch.float64
    cast = fresh(op, sample.arguments)
    for name in op.autocast:
        if isinstance(cast[name], Tensor):
            cast[name] = cast[name].detach().bfloat16().requires_grad_()
    assert_close(output, op.function(**cast), sample.reduction)
    check(op, sample, arguments, output, random_like(output), torch.bfloat16)
    with use_backend("reference"), torch.autocast(device.type, dtype=torch.bfloat16):
        inside = op.function(**arguments)
    with use_backend("reference"):  # autocast leaves a reference's own arithmetic alone
        assert torch.equal(inside, op.function(**cast))


@every_definition
def test_activation_checkpointing(op: Op, device: torch.device) -> None:
    sample = first(op, device)
    arguments = fresh(op, sample.arguments)
    output = checkpoint(lambda: op.function(**arguments), use_reentrant=False)
    check(op, sample, arguments, output, random_like(output), torch.float32)


@every_op
def test_deterministic_algorithms(op: Op, device: torch.device) -> None:
    sample = first(op, device)
    runs = []
    for _ in range(2):
        arguments = fresh(op, sample.arguments)
        with deterministic_algorithms():
            output = op.function(**arguments)
        # The backward pass runs outside: the flag was captured by the forward pass.
        names = differentiated(op, arguments)
        inputs = [arguments[name] for name in names]
        runs.append([output, *torch.autograd.grad(output, inputs, random_like(output), retain_graph=True)])
    check(op, sample, arguments, output, random_like(output), torch.float32)
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@every_definition
def test_second_derivative_is_refused(op: Op, device: torch.device) -> None:
    arguments = fresh(op, first(op, device).arguments)
    leaves = [arguments[name] for name in differentiated(op, arguments)]
    output = op.function(**arguments)
    # The gradient of a linear op depends on the incoming gradient alone.
    grad = random_like(output).requires_grad_()
    gradients = torch.autograd.grad(output, leaves, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        sum(gradient.square().sum() for gradient in gradients).backward()


@every_definition
def test_forced_backend(op: Op, device: torch.device) -> None:
    arguments = fresh(op, first(op, device).arguments, wanted=())
    with use_backend("reference"):
        expected = op.function(**arguments)
    with use_backend("triton"):
        if can_run(device, torch.float32)[0]:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert_close(op.function(**arguments), expected, first(op, device).reduction)
        with pytest.raises(RuntimeError, match=r"forced, but .*float64"):
            op.function(**fresh(op, arguments, wanted=(), dtype=torch.float64))


@every_definition
def test_declared_gradients_passed_on_are_the_results(op: Op, device: torch.device) -> None:
    """Speed of light charges no write for them, and one for all others."""
    arguments = fresh(op, first(op, device).arguments)
    names = differentiated(op, arguments)
    output = op.function(**arguments)
    grad = random_like(output)
    gradients = torch.autograd.grad(output, [arguments[name] for name in names], grad)
    same = [each.data_ptr() == grad.data_ptr() for each in gradients]
    assert tuple(itertools.compress(names, same)) == op.op.passed_on


def test_import_touches_nothing() -> None:
    """No GPU is initialised, nothing heavy is loaded; without interpreter a forced CPU call raises."""
    program = """
import sys, torch
import degmix, degmix.convert, degmix_kernels, degmix_kernels.registry
assert not degmix_kernels.replace_deform_conv(torch.nn.Linear(2, 2)).replaced
loaded = {"timm", "torchvision", "numpy.testing", "rich", "typer", "safetensors"} & set(sys.modules)
assert not loaded, loaded
degmix.DeGMix("tiny", {"depth": 1}, dim=8)
assert "timm" not in sys.modules
assert not torch.cuda.is_initialized()
op = degmix_kernels.registry.OPS[0]
arguments = op.samples(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))[0].arguments
op.function(**arguments)
with degmix_kernels.use_backend("triton"):
    try:
        op.function(**arguments)
    except RuntimeError as error:
        assert "TRITON_INTERPRET" in str(error), error
    else:
        raise AssertionError("a forced backend that cannot run did not raise")
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=environment_without_interpreter())
