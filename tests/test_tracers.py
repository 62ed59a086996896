"""Whoever watches an op sees it: compilers, tracers, dispatch modes, transforms of torch.func, profilers.

The reference backend runs PyTorch's own ops: it has no name of its own in a graph or a profile, and no
registered op for ``opcheck``.
"""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import degmix_kernels
from degmix_kernels import backend, setting, use_backend
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
        grads: two gradients of the result.
    """

    def __init__(self, op: Op, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.op, sample = op, first(op, device, dtype)
        self.reduction, self.arguments = sample.reduction, fresh(op, sample.arguments, wanted=())
        self.names = differentiated(op, self.arguments)
        self.tensors = tuple(self.arguments[name] for name in self.names)
        self.weights = random_like(op.reference(**fresh(op, sample.arguments, wanted=())))
        self.grads = torch.stack([self.weights, 2 * self.weights])

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.op.function(**self.arguments | dict(zip(self.names, tensors, strict=True)))

    def loss(self, *tensors: Tensor) -> Tensor:
        """One number that depends on every element in a way of its own."""
        return (self(*tensors) * self.weights).sum()

    def others(self) -> tuple[Tensor, ...]:
        """Other values, on which variances are as positive."""
        return tuple(1.5 * tensor for tensor in self.tensors)

    def gradients(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(self.loss(*leaves), leaves)

    def transformed(self, *tensors: Tensor) -> dict[str, Sequence[Tensor]]:
        """Several calls at once: what transforms return, whose first axis is the calls."""

        def over(at: int, function: Callable) -> Any:
            """vmap over one tensor, which has two slices."""
            slices = torch.stack([tensors[at], 1.5 * tensors[at]])
            return torch.vmap(lambda part: function(*tensors[:at], part, *tensors[at + 1 :]))(slices)

        def two(*tensors: Tensor) -> Tensor:
            loss = self.loss(*tensors)
            return torch.stack([loss, 2 * loss])

        every = tuple(range(len(tensors)))
        grad, (_, vjp) = torch.func.grad(self.loss, every), torch.func.vjp(self.__call__, *tensors)
        return {
            **{f"vmap over {name}": [over(at, self.__call__)] for at, name in enumerate(self.names)},
            "grad": [gradient[None] for gradient in grad(*tensors)],
            "vmap of grad": over(0, grad),
            "jacrev": torch.func.jacrev(two, every)(*tensors),
            "batched gradients": torch.vmap(vjp)(self.grads),
        }

    def looped(self, *tensors: Tensor) -> dict[str, list[Sequence[Tensor]]]:
        """The same, one call at a time."""
        moved = [[1.5 * t if t is one else t for t in tensors] for one in tensors]
        output, gradients = self(*tensors), self.gradients(*tensors)
        twice = [gradients, [2 * gradient for gradient in gradients]]
        return {
            **{f"vmap over {name}": [[output], [self(*moved[at])]] for at, name in enumerate(self.names)},
            "grad": [gradients],
            "vmap of grad": [gradients, self.gradients(*moved[0])],
            **dict.fromkeys(("jacrev", "batched gradients", "is_grads_batched"), twice),
        }


def close(call: Call, actual: Tensor, expected: Tensor, name: str = "output") -> None:
    assert_close(actual, expected.double(), call.reduction, torch.float32, name)


def all_close(call: Call, actual: Iterable[Tensor], expected: Iterable[Tensor], name: str = "all") -> None:
    for index, (mine, other) in enumerate(zip(actual, expected, strict=True)):
        close(call, mine, other, f"{name}, {index}")


def recorded(op: Op, arguments: dict) -> tuple[Tensor, dict[str, Tensor], list[tuple]]:
    """A call's result, its gradients by name, and the arguments of the registered ops of both passes."""
    calls: list[tuple] = []
    compute, fill, names = op.op._compute, op.op.forward, differentiated(op, arguments)

    def record(grads: Sequence, call: Sequence, kept: Sequence, wanted: Sequence) -> list[Tensor | None]:
        calls.append((*grads, *call, *kept, list(wanted)))
        return compute(grads, call, kept, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op.op, "_compute", record)
        patch.setattr(op.op, "forward", lambda call, *made: calls.append(tuple(call)) or fill(call, *made))
        output = op.function(**arguments)
        gradients = torch.autograd.grad(output, [arguments[name] for name in names], random_like(output))
    return output, dict(zip(names, gradients, strict=True)), calls


@every_op
@both_backends
def test_fake_tensors_of_a_gpu(op: Op, chosen: str, device: torch.device) -> None:
    """Without a GPU: shape, dtype, strides and device of the result and of gradients.

    PyTorch's engine asks the driver before it runs a backward pass on a GPU, even on a fake one: the kernels'
    backward op is called without the engine, and gradients of the reference are made without a fake GPU.
    """
    arguments = fresh(op, first(op, device, torch.bfloat16).arguments)
    expected, real, calls = recorded(op, arguments)
    gpu, pairs = torch.device("cuda", 0), []

    def on_gpu(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=gpu)

    with FakeTensorMode() as mode:
        outside = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in arguments.items()}
        inside = op.function(**outside)
        gradients = torch.autograd.grad(inside, [outside[name] for name in real], torch.empty_like(inside))
        if chosen == "triton" or copies_without_a_driver(gpu):
            pairs.append((op.function(**{name: on_gpu(v) for name, v in arguments.items()}), expected, gpu))
        if chosen == "triton":
            found = zip(op.op.call._fields, op.op._enter_backward(*map(on_gpu, calls[1])), strict=False)
            wanted = [pair for pair, want in zip(found, calls[1][-1], strict=True) if want]
            pairs += [(gradient, real[name], gpu) for name, gradient in wanted]
    both = zip((inside, *gradients), (expected, *real.values()), strict=True)
    pairs += [(*pair, device) for pair in both]
    if chosen == "triton":  # the mode is not needed; a reference is plain PyTorch, which needs it
        pairs.append((op.function(**outside), expected, device))
    for fake, value, where in pairs:
        assert (fake.shape, fake.dtype, fake.device) == (value.shape, value.dtype, where)
        assert fake.stride() == value.stride()


def copies_without_a_driver(gpu: torch.device) -> bool:
    """Whether this PyTorch lays out a fake tensor of a GPU anew; older ones ask the driver."""
    try:
        torch.empty(2, 3, 4, 5, device=gpu).contiguous(memory_format=torch.channels_last)
    except RuntimeError:
        return False
    return True


@every_op
@both_backends
def test_graphs_of_make_fx_compute_again(op: Op, chosen: str, device: torch.device) -> None:
    call = Call(op, device)

    def both(*tensors: Tensor) -> tuple[Tensor, ...]:
        return (call(*tensors), *call.gradients(*tensors))

    graph = make_fx(both)(*call.tensors)
    text = graph.code
    assert (f"degmix.{op.name}.default" in text) == (chosen == "triton")
    assert (f"degmix.{op.name}_backward.default" in text) == (chosen == "triton")
    expected = both(*call.others())
    all_close(call, graph(*call.others()), expected)
    for function, more in ((torch.func.functionalize(call), {}), (call.__call__, {"pre_dispatch": True})):
        graph = make_fx(function, **more)(*call.tensors)
        assert (f"degmix.{op.name}.default" in graph.code) == (chosen == "triton")
        close(call, graph(*call.others()), expected[0])


@every_op
@both_backends
def test_traces_of_torchscript_compute_again(op: Op, chosen: str, device: torch.device) -> None:
    call = Call(op, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes are constants of a trace; tracing itself is deprecated
        trace = torch.jit.trace(lambda *tensors: call(*tensors), call.tensors)
    assert (f"degmix::{op.name}" in str(trace.graph)) == (chosen == "triton")
    leaves = [tensor.requires_grad_() for tensor in call.others()]
    output = trace(*leaves)
    close(call, output, call(*leaves))
    gradients = torch.autograd.grad((output * call.weights).sum(), leaves)
    all_close(call, gradients, call.gradients(*leaves))


@every_op
@both_backends
@pytest.mark.usefixtures("no_launches")
def test_flops_are_those_declared(op: Op, chosen: str, device: torch.device) -> None:
    """By PyTorch's counter. A reference may keep what the kernels' backward pass computes again."""
    call = Call(op, device)
    forward, backward = op.forward_work(call.arguments).flops, op.backward_work(call.arguments).flops
    leaves = [tensor.requires_grad_() for tensor in call.others()]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = call(*leaves)
        assert counter.get_total_flops() == forward
        torch.autograd.grad(output, leaves, random_like(output))
    assert counter.get_total_flops() - forward == (backward if chosen == "triton" else 2 * forward)


@every_op
@both_backends
@pytest.mark.usefixtures("no_launches")
def test_multiply_adds_are_those_declared(op: Op, chosen: str) -> None:
    """By fvcore's counter, which needs to be handed how to count the kernels."""
    fvcore = pytest.importorskip("fvcore.nn", reason="needs fvcore, which is not installed")
    call = Call(op, torch.device("cpu"))
    for name in op.batched:  # one picture, as fvcore takes a matrix times a batch for one product
        if isinstance(call.arguments.get(name), Tensor):
            call.arguments[name] = call.arguments[name][:1]
    counter = fvcore.FlopCountAnalysis(_AsModule(call), tuple(call.arguments[name] for name in call.names))
    counter.set_op_handle(**degmix_kernels.fvcore_handles())
    found = counter.unsupported_ops_warnings(False).tracer_warnings("none").by_operator()
    if "aten::scaled_dot_product_attention" in counter.unsupported_ops():
        pytest.skip("fvcore does not count PyTorch's attention")
    names = (op.name,) if chosen == "triton" else ("conv", "linear", "matmul")
    assert op.forward_work(call.arguments).flops == 2 * sum(found[name] for name in names)


class _AsModule(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.call(*tensors)


@every_definition
@both_backends
def test_transforms_equal_loops(op: Op, chosen: str, device: torch.device) -> None:
    """Compiled or not. Dynamo refuses ``torch.autograd.grad``; a vmap of a vjp is compiled in its place."""
    torch._dynamo.reset()
    call = Call(op, device)
    leaves = [tensor.detach().requires_grad_() for tensor in call.tensors]
    batched = torch.autograd.grad(call(*leaves), leaves, call.grads, is_grads_batched=True)
    eager = call.transformed(*call.tensors) | {"is_grads_batched": batched}
    compiled = torch.compile(call.transformed, fullgraph=True, backend="aot_eager")(*call.tensors)
    loops = call.looped(*call.tensors)
    for how, found in ("eager", eager), ("compiled", compiled):
        for name, results in found.items():
            for row, parts in zip(zip(*results, strict=True), loops[name], strict=True):
                all_close(call, row, parts, f"{how} {name}")


@every_definition
def test_forward_mode_is_refused(op: Op, device: torch.device) -> None:
    call = Call(op, device)
    with use_backend("triton"), pytest.raises(RuntimeError, match=rf"{op.name}: .* forward-mode derivative"):
        torch.func.jvp(call, call.tensors, call.tensors)


@every_definition
@pytest.mark.usefixtures("no_launches")
def test_names_are_the_ops(op: Op, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's, what a profiler shows, and the warning where anomaly mode finds the forward call."""
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
    """PyTorch's own examination of a registered op, of both passes; an op's variants are the same one."""
    if last and not op.keeps_layout_of:
        return
    arguments = fresh(op, first(op, device).arguments)
    if last:
        value = arguments[op.keeps_layout_of].detach().contiguous(memory_format=torch.channels_last)
        arguments[op.keeps_layout_of] = value.requires_grad_()
    with use_backend("triton"):
        forward, backward = recorded(op, arguments)[2]
    detached = [value.detach() if isinstance(value, Tensor) else value for value in backward[:-1]]
    told = ("test_schema", "test_faketensor")
    every = {"test_utils": told} if last else {}  # a layout shows in what compilers are told
    torch.library.opcheck(op.op.registered, forward, **every)
    torch.library.opcheck(op.op.registered_backward, (*detached, backward[-1]), **every)
    some = [want and index % 2 == 0 for index, want in enumerate(backward[-1])]
    torch.library.opcheck(op.op.registered_backward, (*detached, some), test_utils=told)


LOAD = """
import sys, torch
for file in sys.argv[1:]:
    if "/triton " in file:
        import degmix_kernels
    tensors, expected = torch.load(file + ".pt", weights_only=True)
    found = torch.export.load(file).module()(*tensors)
    assert torch.equal(found, expected), file
"""


def test_exported_programs_load(device: torch.device, tmp_path: Path) -> None:
    """In a process that imports degmix_kernels before programs with kernels, and nothing for references."""
    files = []
    for chosen, op in product(("reference", "triton"), OPS):
        call, file = Call(op, device), str(tmp_path / f"{chosen} {op.label}.pt2")
        with use_backend(chosen):
            exported = torch.export.export(_AsModule(call), call.tensors)
            torch.export.save(exported, file)
            found = exported.module()(*call.others())
            close(call, found, call(*call.others()))
        assert (f"degmix.{op.name}.default" in exported.graph_module.code) == (chosen == "triton")
        torch.save((call.others(), found), file + ".pt")
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
            setting._stash("degmix_backend", *stashed)
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
