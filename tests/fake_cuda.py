"""pytest plugin: CPU tensors that claim to be on a GPU, and refuse to meet tensors that are not.

    PYTHONPATH=tests python -m pytest -p fake_cuda tests/train tests/examples tests/model/test_head.py

Finds, without a GPU, what a GPU would not do: compute with a tensor on the CPU and one on the GPU, or make a
NumPy array of a tensor on the GPU. Memory that was made on "cuda", or was moved there, is remembered; results
are where their inputs are. PyTorch itself does all the work on the CPU.

What the fake cannot do:

- Nothing is checked within a backward pass: gradients are made in C++, where nobody notes where they are.
- Ops run their references. The kernels' launches are the contract tests' business.
- Memory is never pinned, and streams, events and the generators of a GPU do nothing.
- A process that a test starts is not faked.
- The benchmark's clock needs a real GPU: tests that time something are not for this plugin.

:data:`DESELECTED` names the tests that ask for more.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from bench.gpu.pretend import pretend_cuda

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# Part of a test's id → why the fake cannot run it.
DESELECTED = {
    "test_triton_head_agrees_with_the_reference": "forces Triton",
    "model/test_launch_count.py": "forces Triton",
    "model/test_recompute.py": "forces Triton",
    "model/test_rewrites.py": "forces Triton",
}

BACKWARD = (torch.autograd.backward, torch.autograd.grad, Tensor.backward)
NUMPY = (Tensor.numpy, Tensor.__array__)
# These take tensors of two devices: copies, indices, and what asks for a shape or a type alone.
MEET = {
    *("to", "type_as", "copy_", "set_", "__getitem__", "__setitem__", "index_put_", "expand_as", "view_as"),
    *("reshape_as", "is_same_size", "_has_compatible_shallow_copy_type", "__get__", "__set__"),
}


class FakeCuda(TorchFunctionMode):
    """Knows which memory is the GPU's."""

    def __init__(self) -> None:
        super().__init__()
        # Kept until a test ends, so that no address stands for two memories.
        self.memory: dict[int, torch.UntypedStorage] = {}

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.memory

    def take(self, result: Any) -> None:
        for tensor in filter(is_plain, tree_leaves(result)):
            storage = tensor.untyped_storage()
            self.memory.setdefault(storage._cdata, storage)

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        name = getattr(function, "__name__", str(function))
        first = arguments[0] if arguments else None
        if function is torch.device or name == "_parse_to":  # the latter reads the arguments of Module.to
            return function(*arguments, **options)
        if function in BACKWARD:
            result = function(*arguments, **options)
            if function is torch.autograd.grad:
                inputs = arguments[1] if len(arguments) > 1 else options["inputs"]
                inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
                self.take([each for each, leaf in zip(result, inputs, strict=True) if self.has(leaf)])
            return result
        if is_plain(first):
            if function in (Tensor.cpu, Tensor.cuda, Tensor.to):
                return self.moved(function, first, arguments, options)
            if self.has(first):
                if function == Tensor.device.__get__:
                    return GPU
                if function == Tensor.is_cuda.__get__:
                    return True
                if function == Tensor.is_cpu.__get__:
                    return False
                if function is Tensor.get_device:
                    return GPU.index
                if function in NUMPY:
                    raise TypeError("fake_cuda: can't convert cuda:0 device type tensor to numpy")
        tensors = [leaf for leaf in tree_leaves((arguments, options)) if is_plain(leaf)]
        ours = [tensor for tensor in tensors if self.has(tensor)]
        if ours and name not in MEET:
            others = [tuple(each.shape) for each in tensors if each.dim() > 0 and not self.has(each)]
            if others:
                raise RuntimeError(
                    f"fake_cuda: {name}: expected all tensors on cuda:0, got shapes {others} on cpu"
                )
        wanted = options.get("device")
        if wanted is not None:
            options = {**options, "device": on_cpu(wanted)}
        result = function(*tree_map(on_cpu, arguments), **options)
        if bool(ours) if wanted is None else torch.device(wanted).type == "cuda":
            self.take(result)
        return result

    def moved(self, function: Any, tensor: Tensor, arguments: tuple, options: dict) -> Tensor:
        """What ``cpu``, ``cuda`` or ``to`` returns: a copy, if it was elsewhere before."""
        wanted = {Tensor.cpu: False, Tensor.cuda: True}.get(function, self.has(tensor))
        for value in (*arguments[1:], options.get("device")):
            if isinstance(value, Tensor):
                wanted = self.has(value)
            elif is_device(value):
                wanted = torch.device(value).type == "cuda"
        if function is Tensor.cuda:
            result = tensor
        else:
            options = {name: on_cpu(value) for name, value in options.items()}
            result = function(tensor, *map(on_cpu, arguments[1:]), **options)
        if self.has(tensor) != wanted and result.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            result = result.clone(memory_format=torch.preserve_format)
        if wanted:
            self.take(result)
        return result


def is_plain(value: Any) -> bool:
    """Whether this is a tensor with memory of its own."""
    return type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and value.device == CPU


def is_device(value: Any) -> bool:
    """Whether this names a device."""
    return isinstance(value, torch.device) or (
        isinstance(value, str) and value.partition(":")[0] in ("cuda", "cpu")
    )


def on_cpu(value: Any) -> Any:
    """The CPU in place of the GPU; anything else as it is."""
    return CPU if is_device(value) and torch.device(value).type == "cuda" else value


def pretend() -> None:
    """Change what PyTorch and the ops say about GPUs, for the rest of the process."""
    pretend_cuda(torch)
    torch.accelerator.is_available = lambda: False  # optimizers would ask it for streams
    start = DataLoader.__init__

    def unpinned(self, *arguments, **options) -> None:
        start(self, *arguments, **options | {"pin_memory": False})

    DataLoader.__init__ = unpinned
    # What is computed again in a backward pass says that it is on the CPU.
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    checks["default"] = lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}

    from degmix_kernels import backend

    backend.can_run = lambda device, dtype: (False, "fake_cuda runs references alone")


fake = FakeCuda()
pretend()  # before any conftest asks


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lacking = [item for item in items if any(part in item.nodeid for part in DESELECTED)]
    if lacking:
        config.hook.pytest_deselected(items=lacking)
        items[:] = [item for item in items if item not in lacking]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None]:
    """Fixtures of a module outlive a test, so memory is forgotten only when the module ends."""
    with fake:
        result = yield
    following = item.session.items[item.session.items.index(item) + 1 :][:1]
    if not following or following[0].path != item.path:
        fake.memory.clear()
    return result
