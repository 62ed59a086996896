"""What is measured: a case is one op at one shape; prepared in a dtype, it is a problem with many runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from degmix_kernels.contract import Work

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
            ``checker`` is the :class:`bench.harness.check.Checker` of this problem.
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
        family: the op's folder, such as "deform_conv".
        op: the op's label.
        shape: the shape's name.
        prepare: ``prepare(device, dtype)`` makes the problem.
        implementations: names of all runs of the problem, ours among them.
        dtypes: names of those it can be prepared in.
        modes: mode → what the rows call it.
        images: pictures per call, of models.
        timers: how it is timed on a GPU.
        leading: whether it is at NYUD-v2's maps, which are measured first.
        quick: whether it is a small one, for machines without a GPU.
        compiled_last: whether its baselines that compile come behind those of all other cases.
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
    leading: bool = False
    quick: bool = False
    compiled_last: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What the case can be asked for by: its family, its op, and the op's function."""
        return self.family, self.op, self.op.partition(" (")[0]
