"""Triton's front end accepts every kernel as a GPU would ask for it, and is asked for the right thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compiler.targets import TARGETS
from bench.compiler.trace import launches_of
from degmix_kernels.backend import KERNEL_DTYPES
from degmix_kernels.registry import OPS

REPOSITORY = Path(__file__).parents[2]
KERNELS = {
    (launch.kernel.fn.__module__, launch.kernel.fn.__name__)
    for op in OPS
    for dtype in KERNEL_DTYPES
    for launch in launches_of(op, dtype)
}

FAULTY = """
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from bench.gpu.front_end import Candidate, forced, refusal
from degmix_kernels.launch import Launch

@triton.jit
def average(parts_ptr, parts, blocks):
    tl.store(parts_ptr, (parts // blocks).to(tl.float64))

if __name__ == "__main__":
    arguments = {"parts_ptr": torch.empty(1), "parts": 6, "blocks": 3}
    launch = Candidate("average", Launch(average, 1, arguments, {}))
    for names in ([], ["parts"], ["blocks"], ["parts", "blocks"]):
        print(refusal(forced(launch, names).specialised, GPUTarget("cuda", 90, 32)) is not None)
"""


def run_compiled(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, where kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def check_everything_is_accepted(target: str, *options: str) -> dict:
    """Run the check for one target; its counts."""
    process = run_compiled("-m", "bench.gpu.front_end", target, *options)
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_front_end_accepts_representatives(target: str) -> None:
    counts = check_everything_is_accepted(target)
    assert counts["kernels"] == len(KERNELS)
    assert counts["launched"] > counts["checked"] - counts["forced"] > 5 * len(KERNELS)
    assert (counts["forced"] > 5 * len(KERNELS)) == (TARGETS[target].backend == "cuda")


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_front_end_accepts_everything(target: str) -> None:
    counts = check_everything_is_accepted(target, "--full")
    assert counts["kernels"] == len(KERNELS)
    assert counts["launched"] == counts["checked"] - counts["forced"]
    assert (counts["forced"] > counts["launched"]) == (TARGETS[target].backend == "cuda")


def test_front_end_refuses_what_a_gpu_would(tmp_path: Path) -> None:
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY, encoding="utf-8")
    process = run_compiled(str(program))
    assert process.stdout.split() == ["False", "False", "False", "True"], process.stderr


def test_specialisations_are_those_of_the_runtime() -> None:
    process = run_compiled(str(Path(__file__).with_name("runtime_hashes.py")))
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    assert {(row["module"], row["kernel"]) for row in rows} == KERNELS
    assert not [row for row in rows if row["ours"] != row["runtime"]]
