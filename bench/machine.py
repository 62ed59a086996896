"""What a result file says of the machine: read, not asked for."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from bench.results import Machine

REPOSITORY = Path(__file__).resolve().parents[1]


def read_machine(device: torch.device) -> Machine:
    """The machine as it is now; what cannot be read is None."""
    on_gpu = device.type == "cuda"
    status = _output("git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no")
    return Machine(
        gpu=torch.cuda.get_device_name(device) if on_gpu else None,
        cpu=_processor(),
        driver=_gpu_query("driver_version") if on_gpu else None,
        cuda=torch.version.cuda or torch.version.hip,
        torch=torch.__version__,
        triton=_triton_version(),
        python=platform.python_version(),
        clocks=_gpu_query("clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem") if on_gpu else None,
        commit=_output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD"),
        dirty=None if status is None else bool(status),
    )


def folder_name(machine: Machine) -> str:
    """The machine's folder among the results, such as "nvidia-h200"."""
    words = (machine.gpu or "cpu").lower().split()
    return "-".join("".join(c for c in word if c.isalnum()) for word in words)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _gpu_query(fields: str) -> str | None:
    # The first line is the first GPU's; sm, memory, and the highest of both, each with its unit.
    answer = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


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
