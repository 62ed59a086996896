"""What is measured: a case is one op at one shape; prepared in a dtype, it is a problem with many runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.results import OURS
from bench.shapes import LAUNCH, QUICK
from degmix_kernels.contract import Op, Sample, Work
from degmix_kernels.testing import tolerance

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = ("fwd", "bwd", "fwdbwd")

EVENTS, GRAPH, LOOP, CLOCK = "cuda events", "cuda graph", "cuda loop", "cpu clock"  # what reads the time
SMALL = (GRAPH, LOOP)  # of small shapes, whose times are mostly launches

EAGER = "eager reference"
COMPILED = "torch.compile"
DEFORMOPS = "deformops"
SLOW_TO_START = (COMPILED, DEFORMOPS)  # which compile and tune for minutes before their first result
SEED = 0


class Unavailable(Exception):
    """An implementation that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Run:
    """One implementation, with inputs of its own.

    Attributes:
        forward: computes the results.
        leaves: name → tensor that a backward pass differentiates by.
        own_bytes: of inputs and parameters.
        capturable: whether replays of a CUDA graph are a fair measurement; compiled functions make their own.
        without_graphs: of a run that makes CUDA graphs of its own, makes one that makes none. Memory is
            measured with that: replays allocate nothing, and what they use is in the graphs' own pool. Made
            once, however often it is called.
        update: of a step of training, whose result is its loss: what ends it, given the gradients of the
            leaves. It changes the leaves, so only calls that are timed end with it.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: Mapping[str, Tensor]
    own_bytes: int
    capturable: bool = True
    without_graphs: Callable[[], Run] | None = None
    update: Callable[[Sequence[Tensor | None]], None] | None = None


@dataclass(frozen=True)
class Problem:
    """A case in one dtype on one device, with its data.

    Attributes:
        exact: makes the run of the fp64 reference.
        runs: implementation → makes its run; ``OURS`` is the first. Raises :class:`Unavailable`.
        limit: ``limit(checker, gradients)`` is the largest relative error that ours may show, where
            ``checker`` is the :class:`bench.check.Checker` of this problem.
        work: least work by mode, None where nobody declared it.
        part: what of every tensor ``exact`` computes, where the whole would not fit: leading axes along
            which nothing depends on anything else.
        joint: whether gradients are compared as one vector, for models: some of theirs are nothing but
            cancellation.
        dtype: of our inputs.
    """

    exact: Callable[[], Run]
    runs: Mapping[str, Callable[[], Run]]
    limit: Callable[..., float]
    dtype: torch.dtype
    work: Mapping[str, Work | None] = field(default_factory=dict)
    part: tuple[slice, ...] = ()
    joint: bool = False


@dataclass(frozen=True)
class Case:
    """One op, or the model, at one shape.

    Attributes:
        family: the benchmark's file, such as "deform_conv".
        op: the op's label.
        shape: the shape's name.
        prepare: ``prepare(device, dtype)`` makes the problem.
        implementations: names of all runs of the problem, ours among them.
        dtypes: names of those it can be prepared in.
        modes: mode → what the rows call it.
        images: pictures per call, of models.
        timers: how it is timed on a GPU.
    """

    family: str
    op: str
    shape: str
    prepare: Callable[[torch.device, torch.dtype], Problem]
    implementations: tuple[str, ...]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    modes: Mapping[str, str] = field(default_factory=lambda: {mode: mode for mode in MODES})
    images: int | None = None
    timers: tuple[str, ...] = (EVENTS,)


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
        applies: whether the baseline is one of this dtype; others do not list it.
        load_without_graphs: of a function that makes CUDA graphs of its own, ``load`` of one that does not.
    """

    name: str
    load: Callable[[torch.device], Callable[..., Tensor]]
    dtype: torch.dtype | None = None
    load_without_graphs: Callable[[torch.device], Callable[..., Tensor]] | None = None


def eager(op: Op) -> Baseline:
    """The definition, in plain PyTorch."""
    return Baseline(EAGER, lambda device: op.reference)


def compiled(op: Op) -> Baseline:
    """The definition, as PyTorch's own compiler would run it."""
    return Baseline(
        COMPILED,
        lambda device: compile_here(op.reference, device),
        load_without_graphs=lambda device: compile_without_graphs(op.reference),
    )


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


def op_case(
    family: str,
    op: Op,
    shape: str,
    sample: Callable[[Draw], Sample],
    baselines: tuple[Baseline, ...] = (),
    part: tuple[slice, ...] = (),
) -> Case:
    """The case of an op of the registry.

    Args:
        family: the benchmark's file.
        op: its entry.
        shape: the shape's name.
        sample: draws the arguments; those the op has no gradient for may have any dtype.
        baselines: beside the eager and the compiled reference.
        part: as of :class:`Problem`.
    """
    others = (eager(op), compiled(op), *baselines)

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

    names = (OURS, *(other.name for other in others))
    timers = SMALL if shape.startswith((LAUNCH, QUICK)) else (EVENTS,)
    return Case(family, op.label, shape, prepare, names, timers=timers)


def _part(arguments: Mapping[str, Any], part: tuple[slice, ...]) -> dict[str, Any]:
    return {name: value[part] if isinstance(value, Tensor) else value for name, value in arguments.items()}


def _baseline_run(op: Op, other: Baseline, device: torch.device, arguments: Mapping[str, Any]) -> Run:
    run, plain = op_run(op, other.load(device), arguments, other.dtype), other.load_without_graphs
    if plain is None:
        return run
    return replace(
        run,
        capturable=False,
        without_graphs=cache(lambda: op_run(op, plain(device), arguments, other.dtype)),
    )


def op_run(
    op: Op,
    function: Callable[..., Tensor],
    arguments: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Run:
    own, leaves = dict(arguments), {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            own[name] = value.detach().to(dtype or value.dtype, copy=True)
            if name in op.differentiable:
                leaves[name] = own[name].requires_grad_()
    own_bytes = sum(value.nbytes for value in own.values() if isinstance(value, Tensor))
    return Run(lambda: (function(**own),), leaves, own_bytes)
