"""``make gpu-rehearse``: the visit on this machine, with what can go wrong: all launches, nothing computes.

The first command and the second, each within its deadline, over the driver that launches nothing
(:mod:`bench.gpu.pretend`) and from the folder that ``make gpu-ready`` has left. The check of all ops
crashes, the profile hangs, and a carried package is missing. Both summaries say what would have been kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench.gpu import prepared, pretend, visit
from bench.gpu.prepared import CACHE, FOLDER, REPOSITORY
from bench.gpu.visits import VALUES, VISITS
from bench.harness.command import FAILURE, USER_ERROR

FAULTS = {  # words of a command → what its process does
    f"-k={VALUES}": "crash",
    "-m bench.profile_step": "hang",
}
# Stages that no fault is injected into.
SOUND = ("memcheck", "racecheck", "initcheck", "bench", "huge", "decide")
MOST_FILES, LARGEST_FILE = 8, 16 * 2**20  # that come back from such a machine
# What a machine has beside Python, as far as a visit asks for it.
SANITIZER = """#!/bin/sh
while case $1 in --*) true ;; *) false ;; esac; do [ "$1" = --tool ] && shift; shift; done
exec "$@"
"""
TOOLS = {"compute-sanitizer": SANITIZER, "nvidia-smi": "#!/bin/sh\necho pretended\n"}


def main() -> int:
    """Rehearse; 1 if a kernel was not in the cache, a command or a sound stage failed, 2 if not prepared."""
    facts = prepared.read_facts(FOLDER)
    if facts is None:
        print(f"gpu-rehearse: {FOLDER} is not prepared; make gpu-ready prepares it", file=sys.stderr)
        return USER_ERROR
    with tempfile.TemporaryDirectory() as work:
        return rehearse(Path(work))


def install(tools: Mapping[str, str], folder: Path) -> Path:
    """A new folder of programs, name → text."""
    folder.mkdir()
    for name, text in tools.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def rehearse(work: Path) -> int:
    """Both commands in a folder of their own."""
    tools = install(TOOLS, work / "tools")
    shutil.rmtree(CACHE, ignore_errors=True)  # the visit unpacks it
    environment = os.environ | pretend.environment(work / "pretended", CACHE)
    environment |= {"PATH": f"{tools}{os.pathsep}{environment['PATH']}", "DEGMIX_FAULTS": json.dumps(FAULTS)}
    carried = work / "gpu"  # without the wheels
    carried.mkdir()
    for name in (prepared.ARCHIVE, prepared.FACTS):
        (carried / name).symlink_to(FOLDER / name)
    good = [_command(name, work, environment) for name in ("first", "decide")]
    events = work / "pretended" / "launches.jsonl"
    lines = events.read_text().splitlines() if events.exists() else []
    launched = [event for event in map(json.loads, lines) if "kernel" in event]
    compiled = [event for event in launched if event["compiled"]]
    print(f"\n{len(launched) - len(compiled)} kernels came from the cache, {len(compiled)} were compiled")
    for event in compiled[:20]:
        print(f"  {event['kernel']}: {event['command']}")
    return 0 if all(good) and launched and not compiled else FAILURE


def _command(name: str, work: Path, environment: dict[str, str]) -> bool:
    """One command of the visit, and what it leaves: whether it ended in time, and with few, small files."""
    out = work / name
    print(f"\n##### {name}: {VISITS[name].what}; at most {VISITS[name].deadline} s", flush=True)
    command = [sys.executable, "-m", "bench.gpu.visit", name, "--out", str(out)]
    command += ["--prepared", str(work / "gpu")]
    began = time.monotonic()
    code = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode
    files = sorted(path for path in out.rglob("*") if path.is_file())
    print(f"##### {name}: code {code}; kept:")
    for path in files:
        print(f"  {path.name}: {path.stat().st_size} bytes")
    with tarfile.open(out / "logs.tgz") as archive:
        print(f"  in logs.tgz: {', '.join(archive.getnames())}")
    small = len(files) <= MOST_FILES and all(path.stat().st_size <= LARGEST_FILE for path in files)
    in_time = time.monotonic() - began <= VISITS[name].deadline
    print(f"##### {name}: {len(files)} files, {time.monotonic() - began:.0f} s")
    if failed := broken((out / "summary.txt").read_text()):
        print(f"##### {name}: without a fault of the rehearsal's there failed: {', '.join(failed)}")
    return code in (visit.OK, visit.FAILED) and small and in_time and not failed  # others fail on purpose


def broken(summary: str) -> list[str]:
    """Sound stages that a summary says have failed, or did not run."""
    return [name for name in SOUND if re.search(rf"^ +{name} +(FAILED|not run)", summary, re.MULTILINE)]


if __name__ == "__main__":
    sys.exit(main())
