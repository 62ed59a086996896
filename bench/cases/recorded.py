"""Cases of an op that has no file here: its calls are those of its record in ``degmix_kernels.registry``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.cases.op import Baseline, Draw, op_case
from bench.cases.shapes import QUICK, Convolution, Map
from bench.harness.case import DTYPES, SEED, Case
from degmix_kernels.contract import Op, Sample, Shape

MOST_ELEMENTS = 2**27  # of a tensor: the fp64 reference and its gradients then fit on a GPU


@dataclass(frozen=True)
class Recorded:
    """The cases of an op by its record: its first sample, and the calls that the compile check compiles."""

    op: Op

    def cases(
        self, shapes: Sequence[Map | Convolution] = (), baselines: tuple[Baseline, ...] = ()
    ) -> tuple[Case, ...]:
        """One for each call; none at shapes of somebody's own: a record cannot be drawn at any size."""
        calls = {name: _calls(self.op, dtype) for name, dtype in DTYPES.items()}
        named = dict.fromkeys(shape for each in calls.values() for shape in each)
        return (
            op_case(self.op, QUICK, lambda draw: _samples(self.op, draw)[0], baselines),
            *(
                op_case(
                    self.op,
                    shape,
                    lambda draw, shape=shape: _drawn(self.op, shape, draw),
                    baselines,
                    dtypes=tuple(name for name in DTYPES if shape in calls[name]),
                )
                for shape in named
            ),
        )


def _calls(op: Op, dtype: torch.dtype) -> dict[str, Shape]:
    """Name → call, on tensors without memory; of calls of one name, the first."""
    found: dict[str, Shape] = {}
    with FakeTensorMode():
        for shape in op.shapes(dtype):
            if _elements(shape.arguments) <= MOST_ELEMENTS:
                found.setdefault(_name(op, shape), shape)
    return found


def _name(op: Op, shape: Shape) -> str:
    """Such as "8x256x107x140 channels last"."""
    first = shape.arguments[op.differentiable[0]]
    last = first.dim() == 4 and not first.is_contiguous()
    last = last and first.is_contiguous(memory_format=torch.channels_last)
    return "x".join(map(str, first.shape)) + (" channels last" if last else "")


def _elements(arguments: Mapping[str, Any]) -> int:
    """The number of elements of the largest tensor."""
    return max(value.numel() for value in arguments.values() if isinstance(value, Tensor))


def _samples(op: Op, draw: Draw) -> list[Sample]:
    return op.samples(draw.device, draw.dtype, torch.Generator().manual_seed(SEED))


def _drawn(op: Op, shape: str, draw: Draw) -> Sample:
    """A call whose tensors hold values of the samples, which are such as the op is meant for."""
    samples, arguments = _samples(op, draw), dict(_calls(op, draw.dtype)[shape].arguments)
    for name, like in arguments.items():
        if isinstance(like, Tensor):
            given = [each.arguments.get(name) for each in samples]
            given = [each.flatten() for each in given if isinstance(each, Tensor)]
            values = _any_of(torch.cat(given), like.shape, draw) if given else draw(*like.shape)
            own = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=draw.device)
            arguments[name] = own.copy_(values)
    # No sum has more terms than the largest tensor has elements.
    return Sample(arguments, _elements(arguments))


def _any_of(values: Tensor, shape: Sequence[int], draw: Draw) -> Tensor:
    """Every element is one of the values, each as often as any other."""
    uniform = torch.special.ndtr(draw(*shape, dtype=torch.float32))
    return values[(uniform * len(values)).long().clamp_(max=len(values) - 1)]
