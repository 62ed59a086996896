"""Triton's front end accepts every kernel as a GPU would ask for it, and is asked for the right thing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from contract import environment_without_interpreter

from bench.compiler.targets import TARGETS
from bench.compiler.trace import launches_of
from degmix_kernels.backend import KERNEL_DTYPES
from degmix_kernels.registry import OPS

pytestmark = pytest.mark.skipif(
    triton.__version__.startswith(("3.4", "3.5")), reason="a visit is prepared with Triton 3.6 or later"
)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kernels() -> set[tuple[str, str]]:
    """Module and name of every kernel."""
    launches = (launch for op in OPS for dtype in KERNEL_DTYPES for launch in launches_of(op, dtype))
    return {(launch.kernel.fn.__module__, launch.kernel.fn.__name__) for launch in launches}


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
    environment = environment_without_interpreter() | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("sm_90", []),
        *(pytest.param(target, ["--full"], marks=pytest.mark.full) for target in ("sm_90", "gfx942")),
    ],
)
def test_front_end_accepts_every_kernel(
    target: str, options: list[str], kernels: set[tuple[str, str]]
) -> None:
    """The plain run checks NVIDIA alone; test_compile.py hands a launch of each kernel to AMD's compiler."""
    process = run_compiled("-m", "bench.gpu.front_end", target, *options)
    assert process.returncode == 0, process.stdout + process.stderr
    counts = json.loads(process.stdout.splitlines()[-1])
    assert counts["kernels"] == len(kernels)
    as_they_are = counts["checked"] - counts["forced"]
    if options:
        assert counts["launched"] == as_they_are
    else:
        assert counts["launched"] > as_they_are > 5 * len(kernels)
    assert (counts["forced"] > 5 * len(kernels)) == (TARGETS[target].backend == "cuda")


def test_front_end_refuses_what_a_gpu_would(tmp_path: Path) -> None:
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY, encoding="utf-8")
    process = run_compiled(str(program))
    assert process.stdout.split() == ["False", "False", "False", "True"], process.stderr


def test_specialisations_are_those_of_the_runtime(kernels: set[tuple[str, str]]) -> None:
    process = run_compiled(str(Path(__file__).with_name("runtime_hashes.py")))
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    assert {(row["module"], row["kernel"]) for row in rows} == kernels
    assert not [row for row in rows if row["ours"] != row["runtime"]]
