"""The order of what a GPU is told, on a stand-in that writes it down."""

from __future__ import annotations

import time

import pytest
import torch

from bench import measure
from bench.measure import EVENTS, LOOP, Call

CYCLES_PER_SECOND = 1e9
HOST_SECONDS = 0.002


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str | int]:
    """What the GPU was told to do; a sleep by its cycles."""
    told: list[str | int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("event")

        def elapsed_time(self, other: Event) -> float:
            return 1e3 * measure.CALIBRATION / CYCLES_PER_SECOND

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", told.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("synchronize"))
    monkeypatch.setattr(measure, "_cache_flusher", lambda: lambda: told.append("flush"))
    return told


def launching(told: list[str | int]) -> Call:
    """A call whose launch takes the host a while."""

    def step(prepared: None) -> None:
        time.sleep(HOST_SECONDS)
        told.append("call")

    return Call(lambda: told.append("prepare"), step)


def test_the_device_waits_while_the_host_launches(told: list[str | int]) -> None:
    measure.measure(launching(told), EVENTS, seconds=0)
    *_, prepare, flush, sleep, start, call, end, last = told
    assert [prepare, flush, start, call, end, last] == [
        *("prepare", "flush", "event", "call", "event", "synchronize")
    ]
    assert sleep > measure.AHEAD * HOST_SECONDS * CYCLES_PER_SECOND


def test_a_loop_has_its_launches(told: list[str | int]) -> None:
    measure.measure(launching(told), LOOP, seconds=0)
    repetition = ["synchronize", "event", *["call"] * measure.CALLS_IN_A_ROW, "event", "synchronize"]
    assert told[-len(repetition) :] == repetition
    assert not any(isinstance(each, int) for each in told)


def test_a_backward_pass_can_leave_what_was_saved() -> None:
    leaf = torch.ones(3, requires_grad=True)
    run = measure.Run(lambda: (leaf.square(),), {"leaf": leaf}, leaf.nbytes)
    for keep in (True, False):
        call = measure.call_of(run, "bwd", torch.float32, keep)
        prepared = call.prepare()
        call.step(prepared)
        if keep:
            call.step(prepared)  # as a replay does
        else:
            with pytest.raises(RuntimeError, match="a second time"):
                call.step(prepared)
