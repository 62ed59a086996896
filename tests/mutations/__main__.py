"""Plant every bug of the list in a copy of the repository, one after the other, and run the tests it names.

``python -m tests.mutations`` ends with 1 unless every bug is noticed. The working tree is never touched.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.mutations.mutation import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds of one run
RED, GREEN, BROKEN = "red", "green", "broken"
# A mutation that is no program any more proves nothing about the tests.
NO_PROGRAM = ("NameError", "SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError")


@dataclass(frozen=True)
class Outcome:
    """What one run of tests said: red, green or broken, why, and the seconds it took."""

    colour: str
    message: str
    seconds: float


def copy_tracked(target: Path) -> None:
    """Copy the files that git tracks, as they are in the working tree."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@contextmanager
def planted(mutation: Mutation, copy: Path) -> Iterator[None]:
    """Plant the bug in the copy, and remove it again.

    Raises:
        ValueError: if the old text does not occur exactly once.
    """
    file = copy / mutation.file
    text = file.read_text()
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.name}: expected its old text once in {mutation.file}, got it {count}×")
    file.write_text(text.replace(mutation.old, mutation.new))
    try:
        yield
    finally:
        file.write_text(text)


def run_tests(selection: tuple[str, ...], copy: Path) -> Outcome:
    """Run a selection of tests in the copy, up to the first failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *selection]
    # Bytecode is not kept: Python takes a file of the same size, changed within a second, for the same file.
    settings = {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "500", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=copy, env=os.environ | settings, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return Outcome(BROKEN, f"more than {TIMEOUT} s", time.monotonic() - started)
    seconds, lines = time.monotonic() - started, done.stdout.splitlines()
    failed = [line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
    if done.returncode == 0:
        return Outcome(GREEN, lines[-1], seconds)
    if done.returncode == 1 and failed and not any(error in failed[0] for error in NO_PROGRAM):
        return Outcome(RED, failed[0], seconds)
    return Outcome(BROKEN, failed[0] if failed else f"exit code {done.returncode}", seconds)


def check_the_copy(copy: Path) -> None:
    """Refuse to go on if Python would import the package from elsewhere."""
    program = "import degmix_kernels; print(degmix_kernels.__file__)"
    found = subprocess.check_output([sys.executable, "-c", program], cwd=copy, text=True).strip()
    if not Path(found).resolve().is_relative_to(copy.resolve()):
        raise RuntimeError(f"degmix_kernels: expected the copy's, got {found}")


def run_all(mutations: list[Mutation], progress: Progress) -> Iterator[tuple[Mutation | None, str, Outcome]]:
    """Run every selection without a bug, then every bug's; yield the bug or None, a name, the outcome."""
    runs = [(mutation, selection) for mutation in mutations for selection in mutation.tests]
    runs = [*((None, selection) for selection in dict.fromkeys(each for _, each in runs)), *runs]
    task = progress.add_task("", total=len(runs))
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder)
        copy_tracked(copy)
        check_the_copy(copy)
        for mutation, selection in runs:
            name = f"{mutation.name if mutation else 'without a bug'}: {' '.join(selection)}"
            progress.update(task, description=name)
            with planted(mutation, copy) if mutation else nullcontext():
                yield mutation, name, run_tests(selection, copy)
            progress.advance(task)


def main() -> int:
    """Run the command; 0 if every bug is noticed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="bugs whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="list the bugs and run nothing")
    options = parser.parse_args()
    wanted = options.only or [""]
    chosen = [each for each in MUTATIONS if any(part in each.name for part in wanted)]
    if not chosen:
        parser.error(f"--only: expected a part of a name that --list shows, got {' '.join(wanted)}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    say = partial(console.print, markup=False, highlight=False)
    if options.list:
        for each in chosen:
            say(each.name, each.file, *map(" ".join, each.tests), sep="\n    ")
        return 0
    columns = TextColumn("{task.description}", markup=False), MofNCompleteColumn(), TimeElapsedColumn()
    started, good = time.monotonic(), True
    with Progress(*columns, console=console) as progress:
        for mutation, name, outcome in run_all(chosen, progress):
            good &= outcome.colour == (RED if mutation else GREEN)
            say(f"{outcome.colour}, {outcome.seconds:.0f} s: {name}\n    {outcome.message}", soft_wrap=True)
    say(f"{'every' if good else 'NOT every'} bug is noticed; {time.monotonic() - started:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
