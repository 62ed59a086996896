"""What the compiler makes of every kernel, without a GPU: ``python -m bench.resources --help``.

Every launch that the registry plans is compiled for every target of :mod:`bench.compiler.targets`.
``bench/resources.json`` keeps what came out; tests/kernels/test_compile.py compares. RESOURCES.md explains
both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.compiler.compiled import Compiled, faults, spills
from bench.compiler.targets import TARGETS
from bench.harness.command import USER_ERROR
from bench.harness.results import expect_writable
from degmix_kernels.registry import OPS

BASELINE = Path(__file__).parents[1] / "resources.json"
PINNED = "3.6.0"  # Triton, of make test-pinned
UPDATE = "python -m bench.resources --update"
RECORDED = ("registers", "spilled", "shared", "matrix", "loads")  # of each target, in the baseline
IDENTITY = ("op", "kernel", "dtype", "configuration", "warps", "stages")  # the names of Compiled.key
WIDTH_OF_FILES = 200  # columns of a table that no terminal bounds

Baseline = dict[str, dict[tuple, dict[str, Any]]]
"""Target → key of a launch → what was recorded."""


def compile_for(
    target: str,
    op: str = "",
    dtype: str | None = None,
    benchmark: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
    representatives: bool = False,
) -> tuple[list[Compiled], set[tuple]]:
    """Compile for one target, in a process of its own.

    Args:
        target: a name of :data:`bench.compiler.targets.TARGETS`.
        op: part of the labels of the ops to compile.
        dtype: "fp32", "bf16" or "fp16"; None for all.
        benchmark: the launches of the benchmark's calls, instead of those that the registry plans.
        report: called after each launch with how many are compiled, and of how many.
        representatives: compile only one launch of each kernel, in a dtype that depends on the target.

    Returns:
        What was compiled, and the keys of all launches.

    Raises:
        RuntimeError: if a kernel does not compile, with what the process said.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "bench.compiler.compile_kernels", target, "--op", op]
    command += ["--dtype", dtype] if dtype else []
    command += ["--benchmark"] if benchmark else []
    command += ["--representatives"] if representatives else []
    rows = []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        ) as process,
    ):
        try:
            first = json.loads(process.stdout.readline() or '{"keys": [], "compiled": 0}')
            for line in process.stdout:
                rows.append(Compiled(**json.loads(line)))
                report(len(rows), first["compiled"])
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0:
            errors.seek(0)
            raise RuntimeError(f"{target}: {errors.read().strip()}")
    return rows, {tuple(key) for key in first["keys"]}


def compile_all(
    targets: Sequence[str], op: str, dtype: str | None, benchmark: bool, console: Console
) -> list[Compiled]:
    """Compile for several targets, one on each processor at a time. Every target has a progress bar."""
    with Progress(console=console) as bars, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_one(target: str) -> list[Compiled]:
            bar = bars.add_task(target, total=None)

            def report(done: int, total: int) -> None:
                bars.update(bar, completed=done, total=total)

            return compile_for(target, op, dtype, benchmark, report)[0]

        return [row for rows in pool.map(compile_one, targets) for row in rows]


def by_key(rows: Iterable[Compiled]) -> dict[tuple, Compiled]:
    """The launches of one target by their keys.

    Raises:
        ValueError: if two launches have the same key: the baseline could not tell them apart.
    """
    found: dict[tuple, Compiled] = {}
    for row in rows:
        if row.key in found:
            raise ValueError(f"Compiled.configuration does not tell two launches apart: {_words(row.key)}")
        found[row.key] = row
    return found


def read_baseline(path: Path) -> Baseline:
    """What ``--update`` wrote.

    Raises:
        OSError: if there is no such file.
    """
    baseline: Baseline = {target: {} for target in TARGETS}
    for entry in json.loads(path.read_text(encoding="utf-8"))["launches"]:
        key = tuple(entry[name] for name in IDENTITY)
        for target in TARGETS:
            if target in entry:
                baseline[target][key] = entry[target]
    return baseline


def write_baseline(rows: Iterable[Compiled], path: Path) -> None:
    """Write what was compiled, one line per launch, with all its targets."""
    entries: dict[tuple, dict[str, Any]] = {}
    for target in TARGETS:
        for key, row in by_key(row for row in rows if row.target == target).items():
            entry = entries.setdefault(key, dict(zip(IDENTITY, key, strict=True)))
            entry[target] = {name: getattr(row, name) for name in RECORDED}
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries.values())
    text = f'{{"triton": {json.dumps(version("triton"))}, "launches": [\n{lines}\n]}}\n'
    path.write_text(text, encoding="utf-8")


def may_spill(baseline: Path) -> bool:
    """Whether a spill is nobody's fault here.

    What a compiler does with registers differs between its versions. No kernel may spill with the pinned
    Triton, nor with the one that wrote the baseline. With any other a spill is reported, and fails nothing.
    Without a baseline that can be read, no kernel may spill.
    """
    try:
        wrote = json.loads(baseline.read_text(encoding="utf-8"))["triton"]
    except (OSError, json.JSONDecodeError):
        return False
    return version("triton") not in (PINNED, wrote)


def spilling(rows: Iterable[Compiled]) -> list[str]:
    """The launches that spill, in words."""
    return [f"{row.target}: {_words(row.key)}: spills {row.spilled}" for row in rows if spills(row)]


def differences(
    target: str, rows: Iterable[Compiled], baseline: Baseline, keys: set[tuple] | None = None
) -> list[str]:
    """What a target's launches have lost against the baseline, and which ones it does not know or misses.

    ``keys`` are those of all launches, where not all were compiled. An op that the baseline does not know at
    all is no difference: ``--update`` records its launches.

    Registers, shared memory and load widths are not compared: they differ between versions of Triton.
    """
    found, recorded = by_key(rows), baseline[target]
    keys = set(found) if keys is None else keys
    rank = [None, TARGETS[target].older_matrix, TARGETS[target].matrix]
    ops = {key[0] for key in recorded}  # by IDENTITY
    lines = []
    for key, row in found.items():
        before = recorded[key]["matrix"] if key in recorded else None
        if rank.index(row.matrix) < rank.index(before):
            now = row.matrix or "no matrix instruction"
            lines.append(f"{target}: {_words(key)}: {before} became {now}")
    lines += [f"{target}: {_words(key)}: new" for key in sorted(keys - recorded.keys()) if key[0] in ops]
    lines += [f"{target}: {_words(key)}: gone" for key in recorded if key not in keys]
    return lines


def _words(key: tuple) -> str:
    return "{} {}, {}, {}, {} warps, {} stages".format(*key)


def show(rows: Sequence[Compiled], console: Console) -> None:
    """Print one table per target; of configurations what tells a kernel's launches apart, without strides."""
    for target in dict.fromkeys(row.target for row in rows):
        table = Table(title=f"{target}: occupancy in programs × warps per multiprocessor", expand=True)
        for name in ("op", "kernel", "dtype", "configuration"):
            table.add_column(name, overflow="fold", ratio=3 if name == "configuration" else None)
        for name in ("registers", "spilled", "shared", "occupancy"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in ("matrix", "loads: bits × count"):
            table.add_column(name, overflow="fold")
        listed = [row for row in rows if row.target == target]
        for row in listed:
            peers = [other for other in listed if (other.op, other.kernel) == (row.op, row.kernel)]
            common = set.intersection(*(set(other.configuration.split()) for other in peers))
            common = common if len(peers) > 1 else set()
            own = (word for word in row.configuration.split() if word not in common)
            filled = row.occupancy
            table.add_row(
                row.op,
                row.kernel,
                row.dtype,
                " ".join(word for word in own if "_stride_" not in word),
                str(row.registers),
                str(row.spilled),
                str(row.shared),
                f"{filled.programs} × {row.warps} = {filled.share:.0%}",
                row.matrix or "",
                " ".join(f"{bits}×{count}" for bits, count in row.loads.items()),
                style="red" if faults(row) or spills(row) else None,
            )
        console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 if a kernel does what it may not, or differs from the baseline."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.resources",
        description="Compile every kernel for every supported GPU, without having one: registers, spills, "
        "shared memory, occupancy, matrix instructions, load widths.",
    )
    add = parser.add_argument
    add("--op", default="", help="only ops whose label contains this")
    add("--target", choices=TARGETS, help="only this GPU")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="only this dtype of inputs")
    add(
        "--benchmark",
        action="store_true",
        help="the launches of all calls of ops that the benchmark measures on a GPU, beyond the baseline's",
    )
    add("--json", type=Path, metavar="FILE", help="write every number to this file, too")
    add("--update", action="store_true", help=f"compile everything and write bench/{BASELINE.name}")
    chosen = parser.parse_args(arguments)
    partial = bool(chosen.op or chosen.target or chosen.dtype or chosen.benchmark)
    if not any(chosen.op in op.label for op in OPS):
        parser.error(f"--op {chosen.op}: no op is called so; there are {', '.join(op.label for op in OPS)}")
    if chosen.update and partial:
        parser.error("--update: expected no other option that chooses: the baseline has every kernel")

    messages = Console(stderr=True)
    output = Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_FILES)
    targets = [chosen.target] if chosen.target else list(TARGETS)
    try:
        if chosen.json:
            expect_writable(chosen.json)
        rows = compile_all(targets, chosen.op, chosen.dtype, chosen.benchmark, messages)
        if chosen.json:
            lines = ",\n".join(json.dumps(row.to_json()) for row in rows)
            chosen.json.write_text(f'{{"triton": "{version("triton")}", "rows": [\n{lines}\n]}}\n', "utf-8")
    except OSError as error:
        print(f"bench.resources: --json: {error}", file=sys.stderr)
        return USER_ERROR
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    faulty = [f"{row.target}: {_words(row.key)}: {fault}" for row in rows for fault in faults(row)]
    spilled, excused = spilling(rows), not chosen.update and may_spill(BASELINE)
    faulty += [] if excused else spilled
    if not chosen.update:
        show(rows, output)
    changed = [] if partial else _changed(rows)
    for line in (*faulty, *changed):
        print(line, file=sys.stderr)
    for line in spilled if excused else ():
        print(f"{line} with Triton {version('triton')}: no failure", file=sys.stderr)
    if faulty:
        return 1
    if chosen.update:
        write_baseline(rows, BASELINE)
        print(
            f"{len(rows)} kernels on {len(targets)} targets, {len(changed)} changes: {BASELINE}",
            file=sys.stderr,
        )
        return 0
    if changed:
        print(f"differs from bench/{BASELINE.name}; if that is meant: {UPDATE}", file=sys.stderr)
    return 1 if changed else 0


def _changed(rows: Sequence[Compiled]) -> list[str]:
    if not BASELINE.exists():
        return [f"bench/{BASELINE.name}: no such file"]
    try:
        baseline = read_baseline(BASELINE)
    except json.JSONDecodeError as error:  # as after a merge; ``--update`` mends it
        return [f"bench/{BASELINE.name}: not JSON: {error}"]
    return [
        line
        for target in TARGETS
        for line in differences(target, [row for row in rows if row.target == target], baseline)
    ]
