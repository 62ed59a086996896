"""What a GPU would have to compile, found without one.

Only in a process without TRITON_INTERPRET: whether a kernel is compiled or interpreted is settled when it is
defined.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.harness.case import DTYPES
from degmix_kernels import backend
from degmix_kernels import launch as launching
from degmix_kernels.contract import Op
from degmix_kernels.launch import INT32_MAX, Launch
from degmix_kernels.tracers import transparent

NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "i64", torch.int32: "i32"}
ALIGNED = 16  # an address, or an integer, that is a multiple of it has a specialisation of its own
MULTIPLE = [["tt.divisibility", ALIGNED]]
# From 3.7 on the launcher gives every constant an empty list of attributes, before only a constant that is a
# string. It makes no difference to the code, but to the hash.
LISTS_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)


@dataclass(frozen=True)
class Specialised:
    """A kernel as it is compiled for one kind of launch; can be pickled.

    Attributes:
        module: where the kernel is defined.
        kernel: its name.
        signature: type of each argument, by name; "constexpr" for what is compiled in.
        constants: what is compiled in, by name: ``tl.constexpr`` arguments, None, and integers that are 1.
        attributes: what else the compiler is told of an argument, by position.
        warps: warps per program.
        stages: depth of the software pipeline.
        hopper_registers: as of :class:`degmix_kernels.launch.Launch`.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    warps: int
    stages: int
    hopper_registers: int | None

    @property
    def source(self) -> ASTSource:
        """What ``triton.compile`` takes; its hash is that of the runtime's own."""
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        return ASTSource(kernel, self.signature, self.constants, self.attributes)

    @property
    def key(self) -> str:
        """The same for two that are compiled to the same."""
        return repr(replace(self, constants=dict(sorted(self.constants.items()))))

    def capped(self, gpu: GPUTarget) -> int | None:
        """Most registers per lane on this GPU, None for any number."""
        return self.hopper_registers if (gpu.backend, gpu.arch) == ("cuda", 90) else None

    def options(self, gpu: GPUTarget) -> dict[str, int]:
        """What ``triton.compile`` is to know for this GPU beside the source."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if (registers := self.capped(gpu)) is not None:
            options["maxnreg"] = registers
        return options


def specialise(launch: Launch) -> Specialised:
    """The specialisation that Triton's launcher would make of these arguments.

    Where a tensor's memory begins is told by its offset: every allocation of a GPU is aligned.
    """
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, dict(launch.constants), {}
    for position, name in enumerate(names):
        value = launch.arguments.get(name)
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            value = constants.setdefault(name, value)
            if LISTS_CONSTANTS or isinstance(value, str):
                attributes[position,] = []
        elif isinstance(value, Tensor):
            signature[name] = "*" + NAMES[value.dtype]
            # The address of nothing is 0.
            offset = value.storage_offset() * value.element_size() if value.numel() > 0 else 0
            attributes[position,] = MULTIPLE if offset % ALIGNED == 0 else []
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value <= INT32_MAX else "i64"
            attributes[position,] = MULTIPLE if value % ALIGNED == 0 else []
    function = launch.kernel.fn
    return Specialised(
        function.__module__,
        function.__name__,
        signature,
        constants,
        attributes,
        launch.num_warps,
        launch.num_stages,
        launch.hopper_registers,
    )


def launches_of(op: Op, dtype: torch.dtype) -> list[Launch]:
    """What the calls launch that an op wants compiled: in inference, in training, and backward."""
    seen: list[Launch] = []
    with FakeTensorMode(), traced(seen.append):
        for shape in op.shapes(dtype):
            leaves = [shape.arguments[name] for name in op.differentiable if name in shape.arguments]
            torch.use_deterministic_algorithms(shape.deterministic)
            try:
                both_passes(op.function, shape.arguments, [leaf for leaf in leaves if leaf is not None])
            finally:
                torch.use_deterministic_algorithms(False)
    return seen


def both_passes(function: Callable[..., Any], arguments: Mapping[str, Any], leaves: Sequence[Tensor]) -> None:
    """Call a function in inference and in training, and compute all gradients."""
    with torch.no_grad():
        function(**arguments)
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = [output for output in tree_leaves(function(**arguments)) if output.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.empty_like(output) for output in outputs])


def _runs_everywhere(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    return dtype in backend.KERNEL_DTYPES, f"Triton kernels take no {dtype}"


@contextmanager
def traced(record: Callable[[Launch], object]) -> Iterator[None]:
    """Hand every launch made inside to ``record``, as if all tensors were a GPU's; none of them runs."""
    with (
        backend.use_backend("triton"),
        transparent(True),
        patch.object(launching, "_launch", record),
        patch.object(backend, "can_run", _runs_everywhere),
    ):
        yield
