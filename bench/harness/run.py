"""The benchmark's loop: everything is checked, then timed; a failure is a row and stops nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch

from bench.harness.case import COMPILED, DTYPES, GRAPH, LOOP, SLOW_TO_START, Case, Problem, Run, Unavailable
from bench.harness.ceilings import speed_of_light
from bench.harness.check import Checker, CheckFailed, Unchecked
from bench.harness.measure import call_of, measure, peak_bytes, timers
from bench.harness.results import OURS, UNAVAILABLE, Ceilings, Row
from bench.harness.selection import ALONE, Selection

Advance = Callable[[Row], None]


class DeviceLost(Exception):
    """The GPU answers no more: nothing can be measured until another process starts; the message says why."""


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

    ``advance`` is called once for each implementation and mode, with a row that says what comes next.

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
                row = Row(case.op, case.shape, dtype, case.modes[mode], name, images=case.images)
                advance(row)
                if reason is not None or make is None:
                    yield (replace(row, status=reason),)
                else:
                    yield _rows(checker, make, row, mode, case, place)
                if device.type == "cuda":
                    _forget()
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
        timed = replace(row, timer=timer, speed_of_light=light, **asdict(timing))
        yield _with_peak(timed, made, mode, problem.dtype) if place.device.type == "cuda" else timed


def _with_peak(row: Row, made: Run, mode: str, dtype: torch.dtype) -> Row:
    try:
        plain = made if made.without_graphs is None else made.without_graphs()
        return replace(row, peak_bytes=peak_bytes(call_of(plain, mode, dtype), plain.own_bytes))
    except Exception as error:  # the times are known and stay
        return replace(row, status=f"peak memory: {_words(error)}")


def _words(error: Exception) -> str:
    """One line about why there are no times."""
    if isinstance(error, Unavailable):
        return f"{UNAVAILABLE}: {error}"
    text = next(iter(str(error).strip().splitlines()), "")
    return f"failed: {type(error).__name__}: {text}"[:300]


def _forget() -> None:
    """Give the GPU's memory back, so that the next one starts with what this one did.

    Raises:
        DeviceLost: if an error, such as an illegal address, has ended all work of this process on the GPU.
    """
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(_words(error)) from error
