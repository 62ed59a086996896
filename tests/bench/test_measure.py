"""The order of what a GPU is told, on a stand-in that writes it down."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from bench.harness import measure
from bench.harness.measure import EVENTS, LOOP, Call

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
    assert (prepare, flush) == ("prepare", "flush")
    assert (start, call, end, last) == ("event", "call", "event", "synchronize")
    assert sleep > measure.AHEAD * HOST_SECONDS * CYCLES_PER_SECOND


def test_a_loop_has_its_launches(told: list[str | int]) -> None:
    for seconds, calls in ((0, 1), (measure.CALLS_IN_A_ROW * measure.FEWEST * 2 * HOST_SECONDS, None)):
        told.clear()
        measure.measure(launching(told), LOOP, seconds)
        repetition = ["synchronize", "event", *["call"] * (calls or measure.CALLS_IN_A_ROW), "event"]
        assert told[-len(repetition) - 1 : -1] == repetition
        assert not any(isinstance(each, int) for each in told)


def test_a_capture_that_fails_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream from before is current again, and the pool is closed; the error is the capture's."""
    told: list[object] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    @contextmanager
    def failing(graph: object, pool: object, stream: object) -> Iterator[None]:
        yield
        raise RuntimeError("the capture failed")

    for name, stand_in in {
        "Stream": Stream,
        "CUDAGraph": object,
        "graph": failing,
        "stream": nullcontext,
        "synchronize": lambda: None,
        "current_stream": lambda: "before",
        "current_device": lambda: 0,
        "graph_pool_handle": lambda: "pool",
        "set_stream": told.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *which: told.append(which))
    with pytest.raises(RuntimeError, match="the capture failed"):
        measure._captured(Call(lambda: None, lambda _: None))
    assert told == ["before", (0, "pool")]


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


def test_times_are_those_of_one_call(told: list[str | int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Median and quantiles of what the events say, over the calls between them; warm-up comes first."""
    # One repetition in ten takes 20 calls · 1 ms, one 20 · 2 ms, and so on.
    times = iter(20.0 * (1 + index % 10) for index in range(10**6))
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda start, end: next(times))
    seconds = measure.CALLS_IN_A_ROW * measure.FEWEST * 2 * HOST_SECONDS
    monkeypatch.setattr(measure, "_repetitions", lambda seconds, one: 100)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    timing = measure.measure(launching(told), LOOP, seconds)
    assert (timing.ms, timing.ms_p20, timing.ms_p80) == pytest.approx((5.5, 2.9, 8.1), rel=0.05)
    assert told[: 2 * measure.WARM_UP] == ["prepare", "call"] * measure.WARM_UP


def test_peak_memory_is_what_the_call_adds_and_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1700)
    assert measure.peak_bytes(Call(lambda: None, lambda _: None), own_bytes=30) == 730
