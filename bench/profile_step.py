"""Where the time of a step of training goes, kernel by kernel: ``python -m bench.profile_step``, on a GPU.

Prints PyTorch's profile of the head's training step at NYUD-v2's size, batch 8, in bf16, with our ops and
with the plain formula: what each kernel takes of the device's time, and how busy the device is.
"""

from __future__ import annotations

import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure import call_of
from bench.model import CASES, FORMULA, HEAD
from bench.results import OURS

SHAPE, MODE = "nyud b8", "fwdbwd"
WARM_UP, STEPS = 5, 5
ROWS = 30  # kernels that are shown


def main() -> int:
    """Profile both; 2 without a GPU."""
    if not torch.cuda.is_available():
        print("profile_step: needs a GPU", file=sys.stderr)
        return 2
    (case,) = (each for each in CASES if (each.op, each.shape) == (HEAD, SHAPE) and MODE in each.modes)
    problem = case.prepare(torch.device("cuda"), torch.bfloat16)
    for name in (OURS, FORMULA):
        call = call_of(problem.runs[name](), MODE, problem.dtype)
        for _ in range(WARM_UP):
            call.step(call.prepare())
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            began = time.perf_counter()
            for _ in range(STEPS):
                call.step(call.prepare())
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        averages = profiler.key_averages()
        busy = sum(each.self_device_time_total for each in averages) / 1e6
        share = f"the device works {busy / seconds:.0%} of the time"
        print(f"{name}: {1e3 * seconds / STEPS:.2f} ms a step under the profiler; {share}")
        print(averages.table(sort_by="self_cuda_time_total", row_limit=ROWS), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
