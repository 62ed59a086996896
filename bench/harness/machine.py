"""What a result file says of the machine: read, not asked for."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from bench.harness.results import UNKNOWN, Machine
from degmix_kernels.backend import INTERPRETED, chosen

REPOSITORY = Path(__file__).resolve().parents[2]
COMMIT_VARIABLE = "BENCH_COMMIT"  # says the commit, in 40 digits; what git says of a copy may be older


def read_machine(device: torch.device) -> Machine:
    """The machine as it is now; what cannot be read is None, a commit that nobody knows "unknown".

    A GPU's clocks are those of a device at work only if it works meanwhile.
    """
    on_gpu = device.type == "cuda"
    driver, clocks = _driver_and_clocks() if on_gpu else (None, None)
    commit, dirty = _revision()
    return Machine(
        gpu=torch.cuda.get_device_name(device) if on_gpu else None,
        cpu=_processor(),
        driver=driver,
        cuda=torch.version.cuda or torch.version.hip,
        torch=torch.__version__,
        triton=_triton_version(),
        python=platform.python_version(),
        clocks=clocks,
        commit=commit,
        dirty=dirty,
        tf32={"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        interpreted=INTERPRETED and chosen() != "reference",
    )


def _revision() -> tuple[str, bool | None]:
    """Commit, and whether the code is another: changed files, or Python files that git does not know.

    Where the environment says the commit, git is not asked: files may have been copied beside an older .git.
    """
    said = os.environ.get(COMMIT_VARIABLE, "")
    if said:
        return said if re.fullmatch("[0-9a-f]{40}", said) else UNKNOWN, None
    git = ("git", "-C", str(REPOSITORY))
    top, commit = _output(*git, "rev-parse", "--show-toplevel"), _output(*git, "rev-parse", "HEAD")
    # A copy without .git may lie in somebody else's repository.
    if top is None or commit is None or Path(top).resolve() != REPOSITORY:
        return UNKNOWN, None
    status = _output(*git, "status", "--porcelain", "--untracked-files=all")
    if status is None:
        return UNKNOWN, None
    lines = status.splitlines()
    return commit, any(not line.startswith("??") or line.endswith((".py", '.py"')) for line in lines)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _driver_and_clocks() -> tuple[str | None, str | None]:
    # The first line is the first GPU's; clocks of sm, memory, and the highest of both, each with its unit.
    wanted = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    answer = _output("nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader")
    if not answer:
        return None, None
    driver, _, clocks = answer.splitlines()[0].partition(", ")
    return driver, clocks


def _triton_version() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None
