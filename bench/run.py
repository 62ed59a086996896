"""The benchmark's loop: everything is checked, then timed; a failure is a row and stops nothing."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

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
from bench.cases import COMPILED, DTYPES, GRAPH, LOOP, SLOW_TO_START, Case, Problem, Run, Unavailable
from bench.ceilings import speed_of_light
from bench.check import Checker, CheckFailed, Unchecked
from bench.measure import call_of, measure, peak_bytes, timers
from bench.results import OURS, UNAVAILABLE, Ceilings, Key, Row
from bench.shapes import QUICK, is_leading

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

ALONE = "bwd"  # the backward pass alone is what fewest ask for
FIRST_DTYPE = "bf16"

Advance = Callable[[Row], None]
Wanted = dict[str, list[str]]
"""Implementation → modes."""


class DeviceLost(Exception):
    """The GPU answers no more: nothing can be measured until another process starts; the message says why."""


@dataclass(frozen=True)
class Selection:
    """What is to be measured.

    Attributes:
        cases: in their order.
        modes: "fwd", "bwd", "fwdbwd"; a case without one of them leaves it out.
        dtypes: names; likewise.
        baselines: names of the baselines beside ours; None for all.
        seconds: for one measurement.
        quick: whether what takes minutes to start is left out.
        done: of rows that an earlier call left.
        repeatable: of ours among those. They are measured again beside every baseline that comes later: only
            times of one call are compared.
    """

    cases: tuple[Case, ...]
    modes: tuple[str, ...]
    dtypes: tuple[str, ...]
    baselines: tuple[str, ...] | None
    seconds: float
    quick: bool = False
    done: frozenset[Key] = frozenset()
    repeatable: frozenset[Key] = frozenset()

    def rounds(self) -> Iterator[tuple[Case, str, Wanted]]:
        """Every case in its dtypes, with what is left to measure of it, the most valuable first.

        First bf16 at NYUD-v2's maps, then its other shapes, then other dtypes. Baselines that take minutes
        to start follow in the same order, that of the whole model last; backward passes alone come last.
        """
        leading = _leading(self.cases)
        together = [mode for mode in self.modes if mode != ALONE]
        alone = [mode for mode in self.modes if mode == ALONE]
        every = itertools.product((together, alone), self.dtypes, self.cases, (False, True))
        repeated: set[Key] = set()

        def rank(each: tuple[list[str], str, Case, bool]) -> tuple[bool, ...]:
            modes, dtype, case, slow = each
            slowest = slow and case.op == model.WHOLE
            return modes is alone, slow, slowest, dtype != FIRST_DTYPE, case not in leading

        for modes, dtype, case, slow in sorted(every, key=rank):
            names = [name for name in self._implementations_of(case) if (name in SLOW_TO_START) == slow]
            wanted = {name: self._left(case, dtype, modes, name) for name in names}
            wanted = {name: left for name, left in wanted.items() if left}
            left = dict.fromkeys(itertools.chain(*wanted.values()))
            again = {_row(case, dtype, mode, OURS).key: mode for mode in left}
            again = {key: mode for key, mode in again.items() if key in self.repeatable - repeated}
            repeated |= again.keys()
            if wanted:
                yield case, dtype, {OURS: [*again.values(), *wanted.pop(OURS, ())], **wanted}

    def headline(self) -> Selection:
        """What a report shows: NYUD-v2's maps in the first dtype, without what takes minutes to start."""
        names = tuple(
            name for case in self.cases for name in case.implementations if name not in SLOW_TO_START
        )
        return replace(self, cases=tuple(_leading(self.cases)), dtypes=(FIRST_DTYPE,), baselines=names)

    def keys(self) -> frozenset[Key]:
        """Of the rows that are left to measure."""
        return frozenset(
            _row(case, dtype, mode, name).key
            for case, dtype, wanted in self.rounds()
            for name, modes in wanted.items()
            for mode in modes
        )

    def __len__(self) -> int:
        return len(self.keys())

    def _implementations_of(self, case: Case) -> list[str]:
        return [
            name
            for name in case.implementations
            if name == OURS or self.baselines is None or name in self.baselines
        ]

    def _left(self, case: Case, dtype: str, modes: Sequence[str], name: str) -> list[str]:
        return [
            mode
            for mode in modes
            if mode in case.modes
            and dtype in case.dtypes
            and _row(case, dtype, mode, name).key not in self.done
        ]


def _leading(cases: Sequence[Case]) -> list[Case]:
    """The cases at NYUD-v2's maps; of an op that has none, those at its first shape."""
    leading = [case for case in cases if is_leading(case.shape)]
    firsts = {case.op: case.shape for case in reversed(cases)}
    known = {case.op for case in leading}
    return leading + [case for case in cases if case.op not in known and case.shape == firsts[case.op]]


@dataclass(frozen=True)
class Place:
    """Where measurements run, what it reaches, and how long each may take."""

    device: torch.device
    ceilings: Ceilings
    seconds: float


def run(
    selection: Selection, device: torch.device, ceilings: Ceilings, advance: Advance
) -> Iterator[tuple[Row, ...]]:
    """Measure everything that is selected; rows come as they are known, those of one measurement together.

    Args:
        selection: what.
        device: where.
        ceilings: what the device reaches.
        advance: called once for each implementation and mode, with a row that says what comes next.

    Raises:
        DeviceLost: after the rows of the measurement that lost it.
    """
    place = Place(device, ceilings, selection.seconds)
    for case, dtype, wanted in selection.rounds():
        status, checker, make = None, None, None  # which lets go of what the round before held
        try:
            gradients = any(mode != "fwd" for modes in wanted.values() for mode in modes)
            checker = Checker(case.prepare(device, DTYPES[dtype]), gradients)
        except Exception as error:  # whatever it is, the other cases are measured
            status = _words(error)
        for name, modes in wanted.items():
            # Once for all modes: it may have to be compiled.
            make = None if checker is None else cache(checker.problem.runs[name])
            reason = status
            if name in SLOW_TO_START and selection.quick and device.type == "cuda":
                reason = _words(Unavailable("left out by --quick"))
            for mode in modes:
                row = _row(case, dtype, mode, name)
                advance(row)
                if reason is not None or make is None:
                    yield (replace(row, status=reason),)
                else:
                    yield _rows(checker, make, row, mode, case, place)
                _forget(device)
            if name == COMPILED and device.type == "cuda":
                torch.compiler.reset()  # its graphs keep their memory otherwise


def _rows(
    checker: Checker, make: Callable[[], Run], row: Row, mode: str, case: Case, place: Place
) -> tuple[Row, ...]:
    """The rows of one implementation in one mode, one for each timer: checked, then timed."""
    try:
        made, gradients = make(), mode != "fwd"
        if row.impl == OURS:
            checker.check_ours(made, gradients)
        row = replace(row, rel_error=checker.check(made, gradients))
    except CheckFailed as failure:
        return (replace(row, rel_error=failure.error, status=f"check failed: {failure}"),)
    except Unchecked as reason:
        return (replace(row, status=f"not checked: {reason}"),)
    except Exception as error:  # whatever an implementation raises is its row's status
        return (replace(row, status=_words(error)),)
    return tuple(_timed(row, checker.problem, made, mode, case, place))


def _timed(row: Row, problem: Problem, made: Run, mode: str, case: Case, place: Place) -> Iterator[Row]:
    work = problem.work.get(mode)
    if work is not None:
        row = replace(row, bytes=work.bytes, flops=work.flops)
    for timer in timers(place.device, case, made):
        try:
            if timer == LOOP and mode == ALONE and made.without_graphs is not None:
                raise Unavailable("its CUDA graphs hold one forward pass at a time")
            timing = measure(call_of(made, mode, problem.dtype, keep=timer == GRAPH), timer, place.seconds)
        except Exception as error:  # as above
            yield replace(row, timer=timer, status=_words(error))
            continue
        light = speed_of_light(work, timing.ms, place.ceilings, row.dtype) if work is not None else None
        timed = replace(
            row,
            timer=timer,
            ms=timing.ms,
            ms_p20=timing.ms_p20,
            ms_p80=timing.ms_p80,
            speed_of_light=light,
        )
        yield _with_peak(timed, made, mode, problem.dtype) if place.device.type == "cuda" else timed


def _with_peak(row: Row, made: Run, mode: str, dtype: torch.dtype) -> Row:
    try:
        plain = made if made.without_graphs is None else made.without_graphs()
        return replace(row, peak_bytes=peak_bytes(call_of(plain, mode, dtype), plain.own_bytes))
    except Exception as error:  # the times are known and stay
        return replace(row, status=f"peak memory: {_words(error)}")


def _row(case: Case, dtype: str, mode: str, name: str) -> Row:
    return Row(case.op, case.shape, dtype, case.modes[mode], name, images=case.images)


def _words(error: Exception) -> str:
    """One line about why there are no times."""
    if isinstance(error, Unavailable):
        return f"{UNAVAILABLE}: {error}"
    text = next(iter(str(error).strip().splitlines()), "")
    return f"failed: {type(error).__name__}: {text}"[:300]


def _forget(device: torch.device) -> None:
    """Give memory back, so that the next one starts with what this one did.

    Raises:
        DeviceLost: if an error, such as an illegal address, has ended all work of this process on the GPU.
    """
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(_words(error)) from error


def known_shapes() -> Sequence[str]:
    """Names of all shapes, each once, in their order."""
    return tuple(dict.fromkeys(case.shape for case in CASES))


def is_quick(case: Case) -> bool:
    """Whether the case is one of the small ones, for machines without a GPU."""
    return case.shape.startswith(QUICK)
