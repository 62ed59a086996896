"""How long a call takes, and how much memory.

On a GPU, times are the device's: between CUDA events, each call after the L2 cache was overwritten. Of small
shapes, whose times are mostly launches, two other questions are asked: how long the device takes (replays of
a CUDA graph) and how long a caller in a loop does (calls one after the other). On a CPU it is the clock's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import Run
from bench.check import upstream

EVENTS, GRAPH, LOOP, CLOCK = "cuda events", "cuda graph", "cuda loop", "cpu clock"

SECONDS = 0.3  # spent on one measurement, after warm-up
FEWEST, MOST = 3, 100  # samples of one measurement
WARM_UP = 3  # calls at least
CALLS_IN_A_ROW = 20  # of small shapes, where a single call is shorter than what events resolve well
QUANTILES = (0.5, 0.2, 0.8)


@dataclass(frozen=True)
class Call:
    """What is timed, ``step(prepare())``, of which only ``step`` counts."""

    prepare: Callable[[], Any]
    step: Callable[[Any], Any]


@dataclass(frozen=True)
class Timing:
    """Median and quantiles of one call, in milliseconds, and what read the time."""

    timer: str
    ms: float
    ms_p20: float
    ms_p80: float


def call_of(run: Run, mode: str, dtype: torch.dtype) -> Call:
    """A run's forward pass without gradients, its backward pass alone, or both.

    Args:
        run: the implementation.
        mode: "fwd", "bwd" or "fwdbwd".
        dtype: of our inputs, to which the gradients that arrive are rounded.
    """
    if mode == "fwd":

        def inference(_: None) -> Any:
            with torch.no_grad():
                return run.forward()

        return Call(lambda: None, inference)

    grads = upstream(run.forward(), dtype)
    leaves = list(run.leaves.values())

    def backward(outputs: Any) -> Any:
        return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)

    if mode == "bwd":
        return Call(run.forward, backward)
    return Call(lambda: None, lambda _: backward(run.forward()))


def timers(device: torch.device, small: bool, capturable: bool) -> tuple[str, ...]:
    """Which measurements a shape gets."""
    if device.type != "cuda":
        return (CLOCK,)
    if not small:
        return (EVENTS,)
    return (GRAPH, LOOP) if capturable else (LOOP,)


def measure(call: Call, timer: str, seconds: float = SECONDS) -> Timing:
    """Median and 20 % and 80 % quantiles of many calls.

    Args:
        call: what is timed.
        timer: one of :func:`timers`.
        seconds: to spend, about.
    """
    if timer == CLOCK:
        samples = _clock_samples(call, seconds)
    elif timer == EVENTS:
        samples = _event_samples(call, seconds, calls=1, flush=_cache_flusher())
    elif timer == LOOP:
        samples = _event_samples(call, seconds, calls=CALLS_IN_A_ROW)
    else:
        samples = _event_samples(_captured(call), seconds, calls=CALLS_IN_A_ROW)
    return Timing(timer, *_quantiles(samples))


def peak_bytes(call: Call, own_bytes: int, device: torch.device) -> int | None:
    """Most device memory that a call and its inputs take at once; None on a CPU, where nobody counts.

    Args:
        call: what is measured, its preparation included.
        own_bytes: of its inputs and parameters, which exist already.
        device: where it runs.
    """
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.step(call.prepare())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + own_bytes


def _quantiles(samples: list[float]) -> list[float]:
    return torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor(QUANTILES).double()).tolist()


def _repetitions(seconds: float, one: float) -> int:
    return max(FEWEST, min(MOST, round(seconds / max(one, 1e-9))))


def _clock_samples(call: Call, seconds: float) -> list[float]:
    def sample() -> float:
        prepared = call.prepare()
        began = time.perf_counter()
        call.step(prepared)
        return time.perf_counter() - began

    sample()
    return [1e3 * sample() for _ in range(_repetitions(seconds, sample()))]


def _event_samples(
    call: Call, seconds: float, calls: int, flush: Callable[[], object] = lambda: None
) -> list[float]:
    for _ in range(WARM_UP):
        call.step(call.prepare())
    torch.cuda.synchronize()
    began = time.perf_counter()
    call.step(call.prepare())
    torch.cuda.synchronize()
    repetitions = _repetitions(seconds, calls * (time.perf_counter() - began))
    # Nothing waits in between, so that the host runs ahead and its launches are no part of the times.
    pairs = []
    for _ in range(repetitions):
        prepared = [call.prepare() for _ in range(calls)]
        flush()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        while prepared:
            call.step(prepared.pop())
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / calls for start, end in pairs]


def _cache_flusher() -> Callable[[], object]:
    """Overwrites a buffer of twice the L2 cache, so that every call finds its inputs in memory.

    It also keeps the device busy while the host launches the call behind it.
    """
    size = max(2 * torch.cuda.get_device_properties().L2_cache_size, 2**28)
    return torch.empty(size, dtype=torch.uint8, device="cuda").zero_


def _captured(call: Call) -> Call:
    """The call as a CUDA graph; the preparation is made once, before the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call.step(call.prepare())
        prepared = call.prepare()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = call.step(prepared)
    return Call(lambda: None, lambda _, kept=kept: graph.replay())
