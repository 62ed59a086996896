"""The one place that launches Triton kernels: device guard, 64-bit rule, grid rule.

An op *plans* a launch from its tensors (kernel, grid, arguments, block sizes, warps), and ``run`` executes
the plan. Planning touches no memory, so the same planner run on meta tensors tells the compile check which
specialisations the runtime uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from degmix_kernels.backend import INTERPRETED

if INTERPRETED:
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

INT32_MAX = 2**31 - 1


class Launch(NamedTuple):
    """One planned kernel launch.

    Attributes:
        kernel: the ``@triton.jit`` function.
        programs: number of programs, all along grid axis x: axes y and z stop at 65 535.
        arguments: run-time arguments by name: tensors, None, integers, floats.
        constants: ``tl.constexpr`` arguments by name.
        num_warps: warps per program.
        num_stages: software pipeline depth.
        hopper_registers: at most so many registers a thread on GPUs of compute capability 9.0, None for as
            many as the compiler likes: set where a second program per multiprocessor was measured to pay.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    hopper_registers: int | None = None


def needs_64_bit(*tensors: Tensor | None) -> bool:
    """Whether an element of any tensor lies 2³¹ elements or more from its start."""
    for tensor in tensors:
        if tensor is not None and not (tensor.is_contiguous() and tensor.numel() <= INT32_MAX):
            strides = tensor.stride()  # never negative in PyTorch
            last = sum(map(mul, tensor.shape, strides)) - sum(strides)
            if last > INT32_MAX and tensor.numel() > 0:
                return True
    return False


def run(launch: Launch, device: torch.device) -> None:
    """Execute a plan on the device its tensors live on; a plan without programs does nothing.

    Raises:
        ValueError: if the call needs more programs than a grid can hold.
    """
    if launch.programs == 0:
        return
    if launch.programs > INT32_MAX:
        raise ValueError(
            f"grid: expected at most {INT32_MAX} programs, got {launch.programs}; split the batch"
        )
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(launch)
    else:
        _launch(launch)


def _launch(launch: Launch) -> None:
    arguments = launch.arguments
    if INTERPRETED:
        arguments = {
            name: _scalar(value) if type(value) is int else value for name, value in arguments.items()
        }
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if launch.hopper_registers is not None and not INTERPRETED and _on_hopper():
        options["maxnreg"] = launch.hopper_registers
    launch.kernel[(launch.programs,)](**arguments, **launch.constants, **options)


def _on_hopper() -> bool:
    return torch.version.hip is None and _capability(torch.cuda.current_device()) == (9, 0)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _scalar(value: int) -> Any:
    """An integer argument for the interpreter.

    Triton 3.6 makes it an array of one element, which NumPy 2.5 no longer takes as the end of a range; so it
    becomes one of no dimensions here, and loops in kernels end at arguments.
    """
    kind, dtype = (numpy.int32, tl.int32) if abs(value) <= INT32_MAX else (numpy.int64, tl.int64)
    return tl.tensor(TensorHandle(numpy.array(value, kind), dtype), dtype)
