"""``make gpu-ready``: compile whatever a visit will launch, without a GPU, and pack it into ``.gpu``.

The stages of the visits run on this machine as on one with an H100 (:mod:`bench.gpu.pretend`), without a
limit of time. They leave a cache in which the visit finds every kernel and every launcher under its own name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console

from bench.cases import model
from bench.cases.registry import FAMILIES
from bench.gpu import pretend
from bench.gpu.prepared import CACHE, FOLDER, REPOSITORY, WHEELS, pack, python_version, sources
from bench.gpu.visits import VISITS
from bench.harness.command import FAILURE, USER_ERROR, console
from bench.harness.selection import NONE
from degmix.progress import stage

STACK = {"Python": "3.12", "torch": "2.11.0", "triton": "3.6.0"}  # of the machines that are visited
CARRIED = ("deformops",)  # packages that such a machine lacks


def commands() -> dict[str, tuple[str, ...]]:
    """What a visit runs, by names; of the benchmark our kernels alone, at every shape."""
    first = VISITS["first"].stages
    stages = [each for one in (*first, *VISITS["decide"].stages) for each in (one, *one.beside)]
    found = {each.name: each.command for each in stages if each.name not in ("racecheck", "initcheck")}
    ours = ("--baseline", NONE)
    ops = tuple(name for name in FAMILIES if name != model.FAMILY)
    head = ("--op", model.FAMILY, "--dtype", "bf16")
    found["bench"] = ("-m", "bench", "--json", "{out}/results.jsonl", *ours, "--op", *ops)
    found["model"] = ("-m", "bench", "--json", "{out}/model.jsonl", *ours, *head)
    found["tests"] = tuple(word for word in found["tests"] if not word.startswith(("-n", "--timeout")))
    return found


def fill(work: Path, console: Console) -> list[dict]:
    """Run everything; returns all events, as :func:`bench.gpu.pretend.environment` has them."""
    environment = os.environ | pretend.environment(work, CACHE) | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)

    def run(name: str, command: tuple[str, ...]) -> None:
        with (work / f"{name}.log").open("w") as log:
            words = [sys.executable, *(word.format(out=work) for word in command)]
            own = environment | {"DEGMIX_STAGE": name}
            subprocess.run(words, cwd=REPOSITORY, env=own, stdout=log, stderr=log, check=False)

    planned = commands()
    with ThreadPoolExecutor(os.cpu_count()) as pool, stage(console, "stages", len(planned)) as advance:
        running: dict[str, Future] = {name: pool.submit(run, name, each) for name, each in planned.items()}
        while any(not each.done() for each in running.values()):
            left = [name for name, each in running.items() if not each.done()]
            kernels = sum(1 for _ in CACHE.glob("*/__grp__*.json"))
            advance(len(planned) - len(left), f"{kernels} kernels; still: {', '.join(left)}")
            time.sleep(1)
        for each in running.values():
            each.result()
    events = work / "launches.jsonl"
    return [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []


def silent_stages(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """Those that have launched no kernel: something is wrong with them."""
    launched = {event["stage"] for event in events if "kernel" in event}
    return [name for name in commands() if name not in launched]


def carry(console: Console) -> None:
    """Packages that the machine lacks, as wheels."""
    shutil.rmtree(FOLDER / WHEELS, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "-d", FOLDER / WHEELS, *CARRIED], capture_output=True, text=True)
    if done.returncode != 0:
        console.print(f"Not carried: {', '.join(CARRIED)}: {done.stderr.strip()[-300:]}", highlight=False)


def main() -> int:
    """Prepare the folder; 1 if a kernel was refused, 2 where it cannot be made."""
    shown = console()
    here = {
        "Python": python_version(),
        "torch": torch.__version__.partition("+")[0],
        "triton": triton.__version__,
    }
    if here != STACK:
        wanted, found = (", ".join(f"{name} {each[name]}" for name in STACK) for each in (STACK, here))
        print(f"gpu-ready: the cache is of use to {wanted} only, here is {found}", file=sys.stderr)
        return USER_ERROR
    git = ["git", "-C", str(REPOSITORY)]
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    if changed.returncode or changed.stdout:
        print("gpu-ready: commit first, so that results can say what they are of", file=sys.stderr)
        return USER_ERROR
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    began, made_of = time.monotonic(), sources()
    with tempfile.TemporaryDirectory() as work:
        try:
            events = fill(Path(work), shown)
        except RuntimeError as error:
            print(f"gpu-ready: {error}", file=sys.stderr)
            return USER_ERROR
        for name in commands():
            lines = (Path(work) / f"{name}.log").read_text(errors="replace").splitlines()
            shown.print(f"{name}: {lines[-1] if lines else 'nothing said'}", soft_wrap=True, markup=False)
    entries = {entry for event in events for entry in event.get("entries", ())}
    facts = pack(CACHE, entries, FOLDER, commit.strip(), made_of)
    carry(shown)
    refused = sorted({event["refused"] for event in events if "refused" in event})
    if silent := silent_stages(events):
        shown.print(f"NOTHING LAUNCHED by {', '.join(silent)}", soft_wrap=True)
    for each in refused:
        shown.print(f"REFUSED {each}", soft_wrap=True, markup=False)
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) / 2**20
    compiled = sum(event.get("compiled", False) for event in events)
    shown.print(
        f"{FOLDER}: {size:.1f} MiB, {facts.kernels} kernels ({compiled} compiled now),"
        f" {len(refused)} refused, {facts.launchers} launchers, {time.monotonic() - began:.0f} s",
        soft_wrap=True,
    )
    return FAILURE if refused or silent else 0


if __name__ == "__main__":
    sys.exit(main())
