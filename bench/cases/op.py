"""Cases of the ops of ``degmix_kernels.registry``: how calls are drawn, and what stands beside ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.cases.shapes import LAUNCH, QUICK, Convolution, Map, is_leading
from bench.harness.case import COMPILED, DTYPES, EAGER, EVENTS, SEED, SMALL, Case, Problem, Run, Unavailable
from bench.harness.results import OURS
from degmix_kernels.contract import Op, Sample
from degmix_kernels.testing import tolerance


class Draw:
    """Random tensors of one dtype on one device, the same in every run."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(SEED)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal; drawn in fp32, so that every dtype gets the same values."""
        drawn = torch.randn(shape, generator=self._generator, device=self.device)
        return drawn.to(dtype or self.dtype)


@dataclass(frozen=True)
class Baseline:
    """Another implementation of an op.

    Attributes:
        name: as the rows have it.
        load: returns the function, which takes the op's own arguments; raises :class:`Unavailable`, or an
            ImportError, if there is none here.
        dtype: what all floating-point arguments are cast to, if not left in the row's dtype.
        load_without_graphs: of a function that makes CUDA graphs of its own, ``load`` of one that does not.
    """

    name: str
    load: Callable[[torch.device], Callable[..., Tensor]]
    dtype: torch.dtype | None = None
    load_without_graphs: Callable[[torch.device], Callable[..., Tensor]] | None = None


def compile_here(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``torch.compile`` with everything it has.

    Raises:
        Unavailable: on a CPU, where minutes of compiling would say nothing about a GPU.
    """
    if device.type != "cuda":
        raise Unavailable("needs a GPU")
    torch.compiler.reset()  # no case inherits the sizes that another one was compiled for
    compiled = torch.compile(function, mode="max-autotune")

    def stepped(*positional: Any, **named: Any) -> Any:
        # Results of the call before may be overwritten; without this, a forward pass whose backward pass
        # never came would keep all later ones from being replayed.
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*positional, **named)

    return stepped


def compile_without_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same without CUDA graphs, beside what :func:`compile_here` has made and its tuning."""
    return torch.compile(function, mode="max-autotune-no-cudagraphs")


def family_of(op: Op) -> str:
    """The op's folder in ``degmix_kernels``."""
    return op.reference.__module__.split(".")[1]


@dataclass(frozen=True)
class OpCases:
    """The cases of an op.

    Attributes:
        op: its entry in the registry.
        sample: ``sample(draw, shape)`` draws the arguments of a call; those the op has no gradient for may
            have any dtype.
        shapes: that are measured.
        baselines: beside the eager and the compiled reference.
        part: as of :class:`bench.harness.case.Problem`.
        suffix: of the shapes' names.
        takes: whether the op can be measured at a shape of somebody's own.
    """

    op: Op
    sample: Callable[[Draw, Any], Sample]
    shapes: tuple[Map, ...] | tuple[Convolution, ...]
    baselines: tuple[Baseline, ...] = ()
    part: tuple[slice, ...] = ()
    suffix: str = ""
    takes: Callable[[Map | Convolution], bool] = lambda shape: isinstance(shape, Map)

    def cases(
        self, shapes: Sequence[Map | Convolution] = (), baselines: tuple[Baseline, ...] = ()
    ) -> tuple[Case, ...]:
        """One for each shape, and for those of the further ones that the op takes."""
        return tuple(
            op_case(
                self.op,
                shape.name + self.suffix,
                lambda draw, shape=shape: self.sample(draw, shape),
                (*self.baselines, *baselines),
                self.part,
            )
            for shape in (*self.shapes, *filter(self.takes, shapes))
        )


def op_case(
    op: Op,
    shape: str,
    sample: Callable[[Draw], Sample],
    baselines: tuple[Baseline, ...] = (),
    part: tuple[slice, ...] = (),
    dtypes: tuple[str, ...] = tuple(DTYPES),
) -> Case:
    """An op at one shape; arguments as of :class:`OpCases` and :class:`bench.harness.case.Case`."""
    compiled = Baseline(
        COMPILED,
        lambda device: compile_here(op.reference, device),
        load_without_graphs=lambda device: compile_without_graphs(op.reference),
    )
    others = (Baseline(EAGER, lambda device: op.reference), compiled, *baselines)

    def prepare(device: torch.device, dtype: torch.dtype) -> Problem:
        drawn = sample(Draw(device, dtype))
        arguments = drawn.arguments
        runs = {OURS: lambda: op_run(op, op.function, arguments)}
        for other in others:
            runs[other.name] = lambda other=other: _baseline_run(op, other, device, arguments)
        forward, backward = op.forward_work(arguments), op.backward_work(arguments)
        return Problem(
            exact=lambda: op_run(op, op.reference, _part(arguments, part), torch.float64),
            runs=runs,
            limit=lambda checker, gradients: tolerance(dtype, drawn.reduction),
            work={"fwd": forward, "bwd": backward, "fwdbwd": forward + backward},
            part=part,
            dtype=dtype,
        )

    quick = shape.startswith(QUICK)
    return Case(
        family_of(op),
        op.label,
        shape,
        prepare,
        implementations=(OURS, *(other.name for other in others)),
        dtypes=dtypes,
        timers=SMALL if quick or shape.startswith(LAUNCH) else (EVENTS,),
        leading=is_leading(shape),
        quick=quick,
    )


def _part(arguments: Mapping[str, Any], part: tuple[slice, ...]) -> dict[str, Any]:
    return {name: value[part] if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _baseline_run(op: Op, other: Baseline, device: torch.device, arguments: Mapping[str, Any]) -> Run:
    run, plain = op_run(op, other.load(device), arguments, other.dtype), other.load_without_graphs
    if plain is None:
        return run
    return replace(
        run, capturable=False, without_graphs=cache(lambda: op_run(op, plain(device), arguments, other.dtype))
    )


def op_run(
    op: Op, function: Callable[..., Tensor], arguments: Mapping[str, Any], dtype: torch.dtype | None = None
) -> Run:
    own, leaves = dict(arguments), {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            own[name] = value.detach().to(dtype or value.dtype, copy=True)
            if name in op.differentiable:
                leaves[name] = own[name].requires_grad_()
    own_bytes = sum(value.nbytes for value in own.values() if isinstance(value, Tensor))
    return Run(lambda: (function(**own),), leaves, own_bytes)
