"""Where the time of a step of training goes, kernel by kernel: ``python -m bench.profile_step``, on a GPU.

Prints, or with ``--out FILE`` writes, in Markdown, what the largest kernels take of the device's time in the
training step of DeGMix's head at NYUD-v2's size, batch 8, in bf16: with our ops, then with the plain formula.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.cases.model import CASES, FORMULA, HEAD
from bench.harness.case import DTYPES, Case, Unavailable
from bench.harness.command import USER_ERROR
from bench.harness.machine import read_machine
from bench.harness.measure import call_of
from bench.harness.results import OURS, expect_writable
from degmix.files import atomic_file

SHAPE, DTYPE, MODE = "nyud b8", "bf16", "fwdbwd"
WARM_UP, STEPS = 5, 5
LARGEST = 15  # kernels that are shown
LONGEST_NAME = 60  # characters


@dataclass(frozen=True)
class Kernel:
    """One kernel's part of a step; on a CPU, one operation's."""

    name: str  # as the profiler has it
    calls: float
    ms: float  # of all calls together


def step_case(shape: str) -> Case:
    """The head's step of training at a shape."""
    (case,) = (case for case in CASES if (case.op, case.shape) == (HEAD, shape) and MODE in case.modes)
    return case


def profile_step(case: Case, name: str, device: torch.device, dtype: str) -> tuple[float, list[Kernel]]:
    """Wall-clock milliseconds of a step under the profiler, and its kernels.

    Raises:
        Unavailable: if the implementation does not run here.
    """
    problem = case.prepare(device, DTYPES[dtype])
    call = call_of(problem.runs[name](), MODE, problem.dtype)
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(WARM_UP):
        call.step(call.prepare())
    wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(STEPS):
            call.step(call.prepare())
        wait()
        seconds = time.perf_counter() - began
    return 1e3 * seconds / STEPS, kernels(profiler.key_averages(), device)


def kernels(averages: Iterable[Any], device: torch.device) -> list[Kernel]:
    """The kernels of :data:`STEPS` steps from the profiler's averages, the largest first."""
    time_of = attrgetter("self_cpu_time_total")
    if device.type == "cuda":
        # The operations on the host are listed, too, with the time of the kernels that they launched.
        averages = [e for e in averages if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        time_of = attrgetter("self_device_time_total")
    found = [Kernel(each.key, each.count / STEPS, time_of(each) / 1e3 / STEPS) for each in averages]
    return sorted((kernel for kernel in found if kernel.ms), key=lambda kernel: -kernel.ms)


def table(name: str, wall: float, found: list[Kernel]) -> str:
    """The largest kernels and the rest, in Markdown."""
    busy = sum(kernel.ms for kernel in found)
    rest = found[LARGEST:]
    rows = [(f"`{_short(kernel.name)}`", kernel) for kernel in found[:LARGEST]]
    if rest:
        others = Kernel("", sum(kernel.calls for kernel in rest), sum(kernel.ms for kernel in rest))
        rows.append((f"{len(rest)} others", others))
    lines = [
        f"**{name}**: {wall:.2f} ms a step under the profiler, of which the device works {busy / wall:.0%};"
        f" {sum(kernel.calls for kernel in found):g} calls",
        "",
        "| kernel | share | calls | ms |",
        "|---|---:|---:|---:|",
        *(f"| {word} | {each.ms / busy:.1%} | {each.calls:g} | {each.ms:.3f} |" for word, each in rows),
    ]
    return "\n".join(lines) + "\n"


def _short(name: str) -> str:
    """Fit for a cell of a table."""
    name = " ".join(name.split()).replace("|", "/").replace("`", "'")
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def paragraphs() -> Iterator[str]:
    """What was profiled where, and both tables, each as it is known."""
    device = torch.device("cuda")
    machine, case = read_machine(device), step_case(SHAPE)
    versions = f"torch {machine.torch}, triton {machine.triton}, commit {machine.commit[:10]}"
    yield f"{HEAD}, {SHAPE}, {DTYPE}, a step of training. {machine.gpu}, {versions}.\n"
    for name in (OURS, FORMULA):
        try:
            yield table(name, *profile_step(case, name, device, DTYPE))
        except Unavailable as error:
            yield f"**{name}**: {error}\n"
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile both; 2 without a GPU, or where the file cannot be written."""
    parser = argparse.ArgumentParser("python -m bench.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="written once all is known (default: printed)"
    )
    out = parser.parse_args(arguments).out
    if not torch.cuda.is_available():
        print("profile_step: needs a GPU", file=sys.stderr)
        return USER_ERROR
    if out is None:
        for paragraph in paragraphs():
            print(paragraph, flush=True)
        return 0
    try:
        expect_writable(out)
    except OSError as error:
        print(f"profile_step: --out: {error}", file=sys.stderr)
        return USER_ERROR
    with atomic_file(out) as file:
        file.write("\n".join(paragraphs()).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
