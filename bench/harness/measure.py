"""How long a call takes, and how much memory.

On a GPU, times are the device's: between CUDA events, each call after the L2 cache was overwritten. Of small
shapes, whose times are mostly launches, two other questions are asked: how long the device takes (replays of
a CUDA graph) and how long a caller in a loop does (calls one after the other). On a CPU it is the clock's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from bench.harness.case import CLOCK, EVENTS, GRAPH, LOOP, Case, Run
from bench.harness.check import upstream

SECONDS = 0.3  # spent on one measurement, after warm-up
FEWEST, MOST = 10, 100  # samples of one measurement: fewer have no quantiles
WARM_UP = 3  # calls at least
CALLS_IN_A_ROW = 20  # of small shapes, where a single call is shorter than what events resolve well
AHEAD = 1.5  # times as long as the host took to launch them, the device waits before calls that are timed
LEAST_AHEAD = 2e-4  # seconds that it waits at least
CALIBRATION = 10_000_000  # clock cycles, some milliseconds
QUANTILES = (0.5, 0.2, 0.8)


@dataclass(frozen=True)
class Call:
    """What is timed, ``step(prepare())``, of which only ``step`` counts."""

    prepare: Callable[[], Any]
    step: Callable[[Any], Any]


@dataclass(frozen=True)
class Timing:
    """Median and quantiles of one call, in milliseconds, and how many times they are of."""

    ms: float
    ms_p20: float
    ms_p80: float
    runs: int


def call_of(run: Run, mode: str, dtype: torch.dtype, keep: bool = False) -> Call:
    """A run's forward pass without gradients, its backward pass alone, or both and its update.

    Args:
        run: the implementation.
        mode: "fwd", "bwd" or "fwdbwd".
        dtype: of our inputs, to which the gradients that arrive are rounded.
        keep: whether a backward pass leaves what the forward pass saved: a graph of the backward pass alone
            reads it again at every replay.
    """
    if mode == "fwd":

        def inference(_: None) -> Any:
            with torch.no_grad():
                return run.forward()

        return Call(lambda: None, inference)

    if run.update is None:
        grads = upstream(run.forward(), dtype)
    else:
        grads = [torch.ones_like(loss) for loss in run.forward()]
    leaves = list(run.leaves.values())

    def backward(outputs: Any) -> Any:
        return torch.autograd.grad(outputs, leaves, grads, allow_unused=True, retain_graph=keep)

    if mode == "bwd":
        return Call(run.forward, backward)

    def both(_: None) -> Any:
        gradients = backward(run.forward())
        if run.update is not None:
            run.update(gradients)
        return gradients

    return Call(lambda: None, both)


def timers(device: torch.device, case: Case, run: Run) -> tuple[str, ...]:
    """Which measurements a run of a case gets."""
    if device.type != "cuda":
        return (CLOCK,)
    return tuple(timer for timer in case.timers if timer != GRAPH or run.capturable)


def measure(call: Call, timer: str, seconds: float = SECONDS) -> Timing:
    """Median and 20 % and 80 % quantiles of many calls by one of :func:`timers`, in about so many seconds."""
    if timer == CLOCK:
        samples = _clock_samples(call, seconds)
    elif timer == EVENTS:
        samples = _event_samples(call, seconds, calls=1, flush=_cache_flusher(), ahead=True)
    elif timer == LOOP:
        samples = _event_samples(call, seconds, calls=CALLS_IN_A_ROW)
    else:
        samples = _event_samples(_captured(call), seconds, calls=CALLS_IN_A_ROW, ahead=True)
    return Timing(*numpy.quantile(samples, QUANTILES).tolist(), len(samples))


def peak_bytes(call: Call, own_bytes: int) -> int:
    """Most memory of the GPU that a call, its preparation included, and its own inputs take at once."""
    call.step(call.prepare())  # what a first call compiles, tunes or keeps for good is no part of it
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.step(call.prepare())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + own_bytes


def _repetitions(seconds: float, one: float) -> int:
    return max(FEWEST, min(MOST, round(seconds / max(one, 1e-9))))


def _clock_samples(call: Call, seconds: float) -> list[float]:
    _host_seconds(call)
    return [1e3 * _host_seconds(call) for _ in range(_repetitions(seconds, _host_seconds(call)))]


def _event_samples(
    call: Call, seconds: float, calls: int, flush: Callable[[], object] = lambda: None, ahead: bool = False
) -> list[float]:
    """Milliseconds of one call, of every repetition of ``calls`` calls in a row.

    Args:
        call: what is timed.
        seconds: to spend, about.
        calls: in a row between two events, at most: of long ones as many as there is time for.
        flush: called before each repetition.
        ahead: whether the device is kept waiting until the host has launched a repetition, so that its
            launches are no part of the times.
    """
    for _ in range(WARM_UP):
        call.step(call.prepare())
    hosts = [_host_seconds(call, torch.cuda.synchronize) for _ in range(WARM_UP)]
    torch.cuda.synchronize()
    began = time.perf_counter()
    call.step(call.prepare())
    torch.cuda.synchronize()
    one = time.perf_counter() - began
    calls = max(1, min(calls, round(seconds / FEWEST / one)))
    head_start = AHEAD * calls * max(hosts) + LEAST_AHEAD if ahead else 0.0
    cycles = round(head_start * _cycles_per_second()) if ahead else 0
    repetitions = _repetitions(seconds, calls * one + head_start)
    pairs = []
    for _ in range(repetitions):
        prepared = [call.prepare() for _ in range(calls)]
        flush()
        if ahead:
            torch.cuda._sleep(cycles)  # of PyTorch's own tests; there is no public one
        else:
            torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        while prepared:
            call.step(prepared.pop())
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / calls for start, end in pairs]


def _host_seconds(call: Call, wait: Callable[[], object] = lambda: None) -> float:
    """How long the host takes for a call, on a GPU to launch it once ``wait`` has left nothing else to do."""
    prepared = call.prepare()
    wait()
    began = time.perf_counter()
    call.step(prepared)
    return time.perf_counter() - began


def _cycles_per_second() -> float:
    """Ticks per second of the clock that ``torch.cuda._sleep`` counts."""
    torch.cuda._sleep(CALIBRATION)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.cuda._sleep(CALIBRATION)
    end.record()
    torch.cuda.synchronize()
    return CALIBRATION / (start.elapsed_time(end) / 1e3)


def _cache_flusher() -> Callable[[], object]:
    """Overwrites a buffer of twice the L2 cache, so that every call finds its inputs in memory."""
    size = max(2 * torch.cuda.get_device_properties().L2_cache_size, 2**28)
    return torch.empty(size, dtype=torch.uint8, device="cuda").zero_


def _captured(call: Call) -> Call:
    """The call as a CUDA graph; the preparation is made once, before the capture, and kept for the replays.

    All of it on one stream, since a backward pass runs on the stream of its forward pass.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call.step(call.prepare())
        prepared = call.prepare()
    torch.cuda.synchronize()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            results = call.step(prepared)
    except Exception:
        # PyTorch leaves a capture that failed open, and no memory can be given back any more.
        torch.cuda.set_stream(before)
        with suppress(RuntimeError):  # where it has closed it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    return Call(lambda: None, lambda _, kept=(prepared, results): graph.replay())
