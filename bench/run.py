"""The benchmark's loop: everything is checked, then timed; a failure is a row and stops nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from bench import (
    attention,
    batch_norm,
    channel_mix,
    coordinate_bias,
    deform_conv,
    gating,
    linear_norm,
    model,
    task_attention,
)
from bench.cases import COMPILED, DTYPES, Case, Problem, Run, Unavailable
from bench.ceilings import speed_of_light
from bench.check import ANOTHER_FUNCTION, Checker, CheckFailed
from bench.measure import call_of, measure, peak_bytes, timers
from bench.results import OURS, Ceilings, Row
from bench.shapes import LAUNCH, QUICK

# What matters most comes first: a run may be stopped when its time is up.
FAMILIES = (
    model,
    deform_conv,
    coordinate_bias,
    task_attention,
    channel_mix,
    gating,
    linear_norm,
    batch_norm,
    attention,
)
CASES: tuple[Case, ...] = tuple(case for family in FAMILIES for case in family.CASES)

Advance = Callable[[str], None]


@dataclass(frozen=True)
class Selection:
    """What is to be measured.

    Attributes:
        cases: in their order.
        modes: "fwd", "bwd", "fwdbwd"; a case without one of them leaves it out.
        dtypes: names; likewise.
        baselines: names of the baselines beside ours; None for all.
        seconds: for one measurement.
    """

    cases: tuple[Case, ...]
    modes: tuple[str, ...]
    dtypes: tuple[str, ...]
    baselines: tuple[str, ...] | None
    seconds: float

    def rounds(self) -> Iterator[tuple[Case, str, list[str]]]:
        """Every case in each of its dtypes, with its implementations.

        Compiled ones, whose compilation takes longer than all the rest, have rounds of their own, the last.
        """
        for compiled in (False, True):
            for case in self.cases:
                names = [name for name in self.implementations_of(case) if (name == COMPILED) == compiled]
                for dtype in self.dtypes:
                    if names and dtype in case.dtypes and self.modes_of(case):
                        yield case, dtype, names

    def modes_of(self, case: Case) -> list[str]:
        """Its modes among those that are wanted."""
        return [mode for mode in self.modes if mode in case.modes]

    def implementations_of(self, case: Case) -> list[str]:
        """Ours, and its baselines among those that are wanted."""
        return [
            name
            for name in case.implementations
            if name == OURS or self.baselines is None or name in self.baselines
        ]

    def __len__(self) -> int:
        return sum(len(self.modes_of(case)) * len(names) for case, _, names in self.rounds())


def run(
    selection: Selection, device: torch.device, ceilings: Ceilings, advance: Advance
) -> Iterator[tuple[Row, ...]]:
    """Measure everything that is selected; rows come as they are known, those of one run together.

    Args:
        selection: what.
        device: where.
        ceilings: what the device reaches.
        advance: called with a line about what comes next, once for each implementation and mode.
    """
    for case, dtype, names in selection.rounds():
        modes = selection.modes_of(case)
        try:
            checker = Checker(case.prepare(device, DTYPES[dtype]))
        except Exception as error:  # whatever it is, the other cases are measured
            for name in names:
                for mode in modes:
                    advance(f"{case.op} {case.shape} {dtype}")
                    yield (_row(case, dtype, mode, name, status=_words(error)),)
            continue
        for name in names:
            for mode in modes:
                advance(f"{case.op}, {case.shape}, {dtype}, {case.modes[mode]}: {name}")
                yield _rows(checker, case, dtype, mode, name, selection.seconds, device, ceilings)
                _forget(device)


def _rows(
    checker: Checker,
    case: Case,
    dtype: str,
    mode: str,
    name: str,
    seconds: float,
    device: torch.device,
    ceilings: Ceilings,
) -> tuple[Row, ...]:
    """The rows of one implementation in one mode, one for each timer: checked, then timed."""
    row = _row(case, dtype, mode, name)
    problem = checker.problem
    try:
        made = problem.runs[name]()
        gradients = mode != "fwd"
        limit = problem.limit(checker, gradients) if name == OURS else ANOTHER_FUNCTION
        row = replace(row, rel_error=checker.check(made, gradients, limit))
    except CheckFailed as failure:
        return (replace(row, rel_error=failure.error, status=f"check failed: {failure}"),)
    except Exception as error:  # whatever an implementation raises is its row's status
        return (replace(row, status=_words(error)),)
    return tuple(_timed(row, problem, made, mode, seconds, device, ceilings, case.shape == LAUNCH))


def _timed(
    row: Row,
    problem: Problem,
    made: Run,
    mode: str,
    seconds: float,
    device: torch.device,
    ceilings: Ceilings,
    small: bool,
) -> Iterator[Row]:
    work = problem.work.get(mode)
    if work is not None:
        row = replace(row, bytes=work.bytes, flops=work.flops)
    for timer in timers(device, small, made.capturable):
        try:
            call = call_of(made, mode, problem.dtype)
            timing = measure(call, timer, seconds)
            light = speed_of_light(work, timing.ms, ceilings, row.dtype) if work is not None else None
            yield replace(
                row,
                timer=timer,
                ms=timing.ms,
                ms_p20=timing.ms_p20,
                ms_p80=timing.ms_p80,
                peak_bytes=peak_bytes(call, made.own_bytes, device),
                speed_of_light=light,
            )
        except Exception as error:  # as above
            yield replace(row, timer=timer, status=_words(error))


def _row(case: Case, dtype: str, mode: str, name: str, status: str | None = None) -> Row:
    row = Row(case.op, case.shape, dtype, case.modes[mode], name, images=case.images)
    return row if status is None else replace(row, status=status)


def _words(error: Exception) -> str:
    """One line about why there are no times."""
    if isinstance(error, Unavailable):
        return f"not available: {error}"
    text = next(iter(str(error).strip().splitlines()), "")
    return f"failed: {type(error).__name__}: {text}"[:300]


def _forget(device: torch.device) -> None:
    """Give memory back, so that the next one starts with what this one did."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def known_shapes() -> Sequence[str]:
    """Names of all shapes, each once, in their order."""
    return tuple(dict.fromkeys(case.shape for case in CASES))


def is_quick(case: Case) -> bool:
    """Whether the case is one of the small ones, for machines without a GPU."""
    return case.shape.startswith(QUICK)
