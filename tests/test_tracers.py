"""Whoever watches an op sees it: compilers, tracers, dispatch modes, transforms of torch.func, profilers."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from contract import (
    differentiated,
    environment_without_interpreter,
    every_definition,
    every_op,
    first,
    fresh,
    random_like,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import degmix_kernels
from degmix_kernels import backend, use_backend
from degmix_kernels.contract import Op
from degmix_kernels.registry import OPS
from degmix_kernels.testing import assert_close, inside_ops

both_backends = pytest.mark.parametrize("chosen", ["triton", "reference"])


@pytest.fixture(autouse=True)
def chosen_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test on the backend that its parameter names."""
    with use_backend(request.getfixturevalue("chosen") if "chosen" in request.fixturenames else "auto"):
        yield


class Call:
    """A call as a function of its differentiable tensors alone.

    Attributes:
        tensors: their values in the first sample.
        weights: of the result's elements in a loss.
    """

    def __init__(self, op: Op, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.op, sample = op, first(op, device, dtype)
        self.reduction, self.arguments = sample.reduction, fresh(op, sample.arguments, wanted=())
        self.names = differentiated(op, self.arguments)
        self.tensors = tuple(self.arguments[name] for name in self.names)
        self.weights = random_like(op.reference(**fresh(op, sample.arguments, wanted=())))

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.op.function(**self.arguments | dict(zip(self.names, tensors, strict=True)))

    def loss(self, *tensors: Tensor) -> Tensor:
        """One number that depends on every element in a way of its own."""
        return (self(*tensors) * self.weights).sum()

    def others(self) -> tuple[Tensor, ...]:
        """Other values, on which variances are as positive."""
        return tuple(1.5 * tensor for tensor in self.tensors)

    def with_slices(self, index: int) -> tuple[Tensor, ...]:
        """The tensors, of which one has two slices."""
        return tuple(
            torch.stack([tensor, 1.5 * tensor]) if each == index else tensor
            for each, tensor in enumerate(self.tensors)
        )

    def gradients(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(self.loss(*leaves), leaves)


def close(call: Call, actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected.double(), call.reduction, torch.float32)


def all_close(call: Call, actual: Iterable[Tensor], expected: Iterable[Tensor], factor: int = 1) -> None:
    for mine, other in zip(actual, expected, strict=True):
        close(call, mine, factor * other)


@every_definition
@both_backends
def test_fake_tensors_of_a_gpu(op: Op, chosen: str, device: torch.device) -> None:
    """Without a GPU: shape, dtype, strides and device of the result; of gradients, without a fake GPU.

    PyTorch's engine asks the driver before it runs a backward pass on a GPU, even on a fake one.
    """
    call = Call(op, device, torch.bfloat16)
    expected = call(*call.tensors)
    gpu = torch.device("cuda", 0)
    with FakeTensorMode() as mode:
        if chosen == "reference" and not copies_without_a_driver(gpu):
            pytest.skip("this PyTorch asks the driver when it lays out a fake tensor of a GPU anew")
        copies = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=gpu)
            if isinstance(value, Tensor)
            else value
            for name, value in call.arguments.items()
        }
        output = op.function(**copies)
        outside = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in call.arguments.items()}
        leaves = [outside[name].requires_grad_() for name in call.names]
        inside = op.function(**outside)
        gradients = torch.autograd.grad(inside, leaves, torch.empty_like(inside))
    results = [(output, gpu), (inside, device)]
    if chosen == "triton":  # the mode is not needed; a reference is plain PyTorch, which needs it
        results.append((op.function(**outside), device))
    for result, where in results:
        assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, where)
        assert result.stride() == expected.stride()
    for gradient, real in zip(gradients, call.gradients(*call.tensors), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (real.shape, real.dtype, device)
        assert gradient.stride() == real.stride()


def copies_without_a_driver(gpu: torch.device) -> bool:
    try:
        torch.empty(2, 3, 4, 5, device=gpu).contiguous(memory_format=torch.channels_last)
    except RuntimeError:
        return False
    return True


@every_definition
@both_backends
def test_graphs_of_make_fx_compute_again(op: Op, chosen: str, device: torch.device) -> None:
    call = Call(op, device)

    def both(*tensors: Tensor) -> tuple[Tensor, ...]:
        return (call(*tensors), *call.gradients(*tensors))

    graph = make_fx(both)(*call.tensors)
    text = graph.code
    assert (f"degmix.{op.name}.default" in text) == (chosen == "triton")
    assert (f"degmix.{op.name}_backward.default" in text) == (chosen == "triton")
    all_close(call, graph(*call.others()), both(*call.others()))
    functional = make_fx(torch.func.functionalize(call))(*call.tensors)
    close(call, functional(*call.others()), call(*call.others()))


@every_definition
@both_backends
def test_traces_of_torchscript_compute_again(op: Op, chosen: str, device: torch.device) -> None:
    call = Call(op, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are constants of a trace; tracing itself is deprecated
        trace = torch.jit.trace(lambda *tensors: call(*tensors), call.tensors, check_trace=False)
    assert (f"degmix::{op.name}" in str(trace.graph)) == (chosen == "triton")
    leaves = [tensor.requires_grad_() for tensor in call.others()]
    output = trace(*leaves)
    close(call, output, call(*leaves))
    gradients = torch.autograd.grad((output * call.weights).sum(), leaves)
    all_close(call, gradients, call.gradients(*leaves))


@every_definition
@pytest.mark.usefixtures("no_launches")
def test_flops_are_those_declared(op: Op, device: torch.device) -> None:
    """By PyTorch's counter and by fvcore's, which needs to be handed what to count."""
    call = Call(op, device)
    with use_backend("triton"):
        leaves = [tensor.requires_grad_() for tensor in call.others()]
        with FlopCounterMode(display=False) as counter:
            output = call(*leaves)
            assert counter.get_total_flops() == op.forward_work(call.arguments).flops
            torch.autograd.grad(output, leaves, random_like(output))
        both = op.forward_work(call.arguments).flops + op.backward_work(call.arguments).flops
        assert counter.get_total_flops() == both
        fvcore = pytest.importorskip("fvcore.nn", reason="needs fvcore, which is not installed")
        analysis = fvcore.FlopCountAnalysis(_AsModule(call), call.tensors)
        analysis.set_op_handle(**degmix_kernels.fvcore_handles())
        analysis.unsupported_ops_warnings(False).tracer_warnings("none")
        assert 2 * analysis.by_operator()[op.name] == op.forward_work(call.arguments).flops


@every_op
def test_declared_products_are_those_of_the_reference(op: Op) -> None:
    """The FLOPs that speed of light is counted from, against fvcore's count of multiply-adds."""
    fvcore = pytest.importorskip("fvcore.nn", reason="needs fvcore, which is not installed")
    with use_backend("reference"):
        call = Call(op, torch.device("cpu"))
        for name in op.batched:  # one picture, as fvcore takes a matrix times a batch for one product
            if isinstance(call.arguments.get(name), Tensor):
                call.arguments[name] = call.arguments[name][:1]
        counter = fvcore.FlopCountAnalysis(
            _AsModule(call), tuple(call.arguments[name] for name in call.names)
        )
        found = counter.unsupported_ops_warnings(False).tracer_warnings("none").by_operator()
    if "aten::scaled_dot_product_attention" in counter.unsupported_ops():
        pytest.skip("fvcore does not count PyTorch's attention")
    products = sum(found[name] for name in ("conv", "linear", "matmul"))
    assert op.forward_work(call.arguments).flops == 2 * products


class _AsModule(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.call(*tensors)


@every_definition
@both_backends
def test_vmap_equals_a_loop(op: Op, chosen: str, device: torch.device) -> None:
    call = Call(op, device)
    for index, tensor in enumerate(call.tensors):
        slices = call.with_slices(index)
        in_dims = tuple(0 if each == index else None for each in range(len(slices)))
        output = torch.vmap(call.__call__, in_dims)(*slices)
        for each in range(2):
            part = [value[each] if at == index else value for at, value in enumerate(slices)]
            close(call, output[each], call(*part))
        assert tensor.numel() > 0


@every_definition
@both_backends
def test_transforms_differentiate(op: Op, chosen: str, device: torch.device) -> None:
    """grad, vmap of grad, jacrev and batched gradients equal what autograd gives, one call at a time."""
    call = Call(op, device)
    every = tuple(range(len(call.tensors)))
    expected = call.gradients(*call.tensors)
    all_close(call, torch.func.grad(call.loss, every)(*call.tensors), expected)
    slices, in_dims = call.with_slices(0), (0, *(None for _ in every[1:]))
    parts = torch.vmap(torch.func.grad(call.loss, every), in_dims)(*slices)
    for each in range(2):
        others = call.gradients(slices[0][each], *call.tensors[1:])
        all_close(call, [part[each] for part in parts], others)

    def two(*tensors: Tensor) -> Tensor:
        loss = call.loss(*tensors)
        return torch.stack([loss, 2 * loss])

    leaves = [tensor.detach().requires_grad_() for tensor in call.tensors]
    grads = torch.stack([call.weights, 2 * call.weights])
    batched = torch.autograd.grad(call(*leaves), leaves, grads, is_grads_batched=True)
    for found in (torch.func.jacrev(two, every)(*call.tensors), batched):
        for row in range(2):
            all_close(call, [each[row] for each in found], expected, factor=1 + row)


@every_definition
@both_backends
def test_transforms_compile(op: Op, chosen: str, device: torch.device) -> None:
    torch._dynamo.reset()
    call = Call(op, device)
    slices, in_dims = call.with_slices(0), (0, *(None for _ in call.tensors[1:]))
    function = torch.vmap(torch.func.grad(call.loss), in_dims)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    close(call, compiled(*slices), function(*slices))


@every_definition
def test_forward_mode_is_refused(op: Op, device: torch.device) -> None:
    call = Call(op, device)
    with use_backend("triton"), pytest.raises(RuntimeError, match=rf"{op.name}: .* forward-mode derivative"):
        torch.func.jvp(call, call.tensors, call.tensors)


@every_definition
@pytest.mark.usefixtures("no_launches")
def test_names_are_the_ops(op: Op, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the node, of what a profiler shows, of the warning where anomaly mode finds the forward call."""
    call = Call(op, device)
    leaves = [tensor.requires_grad_() for tensor in call.others()]
    with use_backend("triton"), torch.profiler.profile() as profile:
        output = call(*leaves)
        torch.autograd.grad(output, leaves, random_like(output), retain_graph=True)
    names = {event.name for event in profile.events()}
    assert {op.name, f"{op.name}Backward"} <= names
    assert output.grad_fn.name() == f"{op.name}Backward"

    def fail(*_: object) -> None:
        raise RuntimeError("this backward pass fails on purpose")

    with use_backend("triton"), torch.autograd.detect_anomaly(check_nan=False):
        output = call(*leaves)
        monkeypatch.setattr(op.op, "_compute", fail)
        with (
            pytest.warns(UserWarning, match=f"Error detected in {op.name}Backward"),
            pytest.raises(RuntimeError, match="on purpose"),
        ):
            torch.autograd.grad(output, leaves, random_like(output))


@every_definition
@pytest.mark.parametrize("last", [False, True], ids=["", "channels_last"])
def test_opcheck(op: Op, last: bool, device: torch.device) -> None:
    """PyTorch's own examination of a registered op, of both passes."""
    if last and not op.keeps_layout_of:
        return
    arguments = fresh(op, first(op, device).arguments)
    if last:
        value = arguments[op.keeps_layout_of].detach().contiguous(memory_format=torch.channels_last)
        arguments[op.keeps_layout_of] = value.requires_grad_()
    calls: list[tuple] = []

    def record(*values: object) -> list[Tensor | None]:
        grads, call, kept, wanted = values
        calls.append((*grads, *call, *kept, list(wanted)))
        return original(*values)

    original, fill = op.op._compute, op.op.forward
    with pytest.MonkeyPatch.context() as patch, use_backend("triton"):
        patch.setattr(op.op, "_compute", record)
        patch.setattr(op.op, "forward", lambda call, *made: calls.append(tuple(call)) or fill(call, *made))
        output = op.function(**arguments)
        leaves = [arguments[name] for name in differentiated(op, arguments)]
        torch.autograd.grad(output, leaves, random_like(output))
    forward, backward = calls
    detached = [value.detach() if isinstance(value, Tensor) else value for value in backward[:-1]]
    told = ("test_schema", "test_faketensor")
    every = {"test_utils": told} if last else {}  # a layout shows in what compilers are told
    torch.library.opcheck(op.op.registered, forward, **every)
    torch.library.opcheck(op.op.registered_backward, (*detached, backward[-1]), **every)
    some = [want and index % 2 == 0 for index, want in enumerate(backward[-1])]
    torch.library.opcheck(op.op.registered_backward, (*detached, some), test_utils=told)


LOAD = """
import sys, torch
import degmix_kernels
for file in sys.argv[1:]:
    tensors, expected = torch.load(file + ".pt", weights_only=True)
    found = torch.export.load(file).module()(*tensors)
    assert torch.equal(found, expected), file
"""


def test_exported_programs_load(device: torch.device, tmp_path: Path) -> None:
    """In a process that has imported degmix_kernels, and nothing else of this."""
    files = []
    for op in OPS:
        call = Call(op, device)
        with use_backend("triton"):
            exported = torch.export.export(_AsModule(call), call.tensors)
            file = str(tmp_path / f"{op.label}.pt2")
            torch.export.save(exported, file)
            torch.save((call.tensors, exported.module()(*call.tensors)), file + ".pt")
        assert f"degmix.{op.name}.default" in exported.graph_module.code
        files.append(file)
    environment = environment_without_interpreter()
    if backend.INTERPRETED:
        environment["TRITON_INTERPRET"] = "1"
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True, env=environment)


def test_blocks_of_threads_and_tasks_overlap() -> None:
    names, met = ("triton", "reference", "auto"), threading.Barrier(3)

    def thread(name: str) -> str:
        with use_backend(name):
            met.wait(10)
            seen = backend.chosen()
            met.wait(10)
            return seen

    async def task(name: str) -> str:
        with use_backend(name):
            await asyncio.sleep(0.01)
            return backend.chosen()

    async def tasks() -> list[str]:
        return await asyncio.gather(*map(task, names))

    with ThreadPoolExecutor(3) as pool:
        assert tuple(pool.map(thread, names)) == names
    assert tuple(asyncio.run(tasks())) == names
    assert backend.chosen() == "auto"

    async def ends_later(begun: asyncio.Event, ended: asyncio.Event) -> None:
        with use_backend("reference"):
            begun.set()
            await ended.wait()
            assert backend.chosen() == "reference"
            assert told() == ("reference", "reference")

    async def ends_first() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()
        with use_backend("triton"):
            other = contextvars.Context().run(asyncio.ensure_future, ends_later(begun, ended))
            await begun.wait()
        ended.set()
        await other

    def told() -> tuple[str, str]:
        """What backward passes inherit, and what compiled code reads."""
        return torch._C._get_obj_in_tls("degmix_backend")[1], backend._backend._thread.value

    asyncio.run(ends_first())
    assert told() == ("auto", "auto")


def test_backward_threads_inherit_the_choice(device: torch.device) -> None:
    """PyTorch hands what is stashed by name on to the threads of a backward pass."""

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            seen.append(backend.chosen())
            return grad

    seen: list[str] = []
    with use_backend("reference"):
        Look.apply(torch.zeros(1, device=device, requires_grad=True)).backward()  # a GPU's is another thread
        stashed = torch._C._get_obj_in_tls("degmix_backend")

        def inherit() -> None:
            torch._C._stash_obj_in_tls("degmix_backend", stashed)
            seen.append(backend.chosen())
            with use_backend("triton"):
                seen.append(backend.chosen())
            seen.append(backend.chosen())

        with ThreadPoolExecutor(1) as pool:
            pool.submit(inherit).result()
    assert seen == ["reference", "reference", "triton", "reference"]


def test_modes_see_inside_if_they_ask(device: torch.device) -> None:
    """Without the documented way a mode sees an op as one call; with it, what the op allocates."""

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Callable, types: object, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    call = Call(next(op for op in OPS if op.name == "batch_norm"), device)
    with use_backend("triton"):
        with Seen():
            call(*call.tensors)
        assert "degmix.batch_norm.default" in names
        names.clear()
        with inside_ops(Seen()):
            call(*call.tensors)
    assert "degmix.batch_norm.default" not in names
    assert any("empty_like" in name for name in names)
