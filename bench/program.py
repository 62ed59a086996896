"""The command ``python -m bench``: measures, shows, and writes what is measured."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from bench.cases.own import OwnError
from bench.cases.registry import everything, is_complete
from bench.harness import results
from bench.harness.ceilings import at_work, measure_ceilings
from bench.harness.command import FAILURE, INTERRUPTED, LOST, USER_ERROR, console
from bench.harness.compare import CompareError, earlier_results
from bench.harness.machine import REPOSITORY, read_machine
from bench.harness.results import Part, ResultFile, Results, Row
from bench.harness.run import DeviceLost, run
from bench.harness.selection import Selection
from bench.options import UsageError, again, parser, select
from bench.report import pages, tables
from degmix.progress import stage

ENDINGS = {LOST: "The GPU answers no more", INTERRUPTED: "Interrupted"}
UNFINISHED = REPOSITORY / "runs" / "bench"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; its exit code.

    Returns:
        0; 1 if one of our ops failed; 2 for a user's mistake; 3 if the GPU answers no more; 130 if it was
        interrupted.

    Raises:
        KeyboardInterrupt: if nothing was being measured.
    """
    options = parser().parse_args(arguments)
    try:
        return benchmark(options, console())
    except (UsageError, OwnError, CompareError, ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return USER_ERROR


def benchmark(options: argparse.Namespace, shown: Console) -> int:
    """Measure, show and write what the options ask for; the exit code as of :func:`main`."""
    for given in (options.json, options.resume):
        if given is not None:
            results.expect_writable(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    selection = select(options, device)
    before = _resumed(options)
    earlier = None
    if options.compare is not None:
        shown.print(f"Reading or measuring {options.compare}.", soft_wrap=True)
        earlier = earlier_results(options.compare, again(options))
    measured = _start(device, selection, options, before)
    if before is not None:
        selection = replace(selection, done=measured.keys, repeatable=measured.repeatable)
    file = options.json or options.resume or _own_file(measured, selection)
    _say(shown, *tables.machine_lines(measured))
    if options.json is not None:
        options.json.unlink(missing_ok=True)
    measured, code = _measure(measured, selection, device, file, shown)
    _show(shown, measured, earlier, options.compare)
    if file is not None and file.is_relative_to(UNFINISHED) and is_complete(measured):
        try:
            file = pages.publish(file, measured)
        except ValueError as error:  # of uncommitted code
            _say(shown, f"Not among the published results: {error}")
    _say(shown, f"Results: {'in no file: --json FILE keeps them' if file is None else file}")
    if file is not None and measured.rows:
        _say(shown, *pages.write_beside(measured, file))
    if code != 0:
        left = len(replace(selection, done=measured.keys, repeatable=frozenset()))
        hint = "" if file is None or options.quick else f"; {_hint(measured, file)}"
        _say(shown, f"{ENDINGS[code]}: {left} measurements are left{hint}.")
        return code
    return FAILURE if measured.failed else 0


def _say(shown: Console, *lines: str) -> None:
    for line in lines:
        shown.print(line, soft_wrap=True, markup=False)


def _resumed(options: argparse.Namespace) -> Results | None:
    """What is in the file that is to be continued; None if there is none yet."""
    if options.resume is None:
        return None
    if options.json is not None:
        raise UsageError("--json, --resume: expected one of them: a file that is continued is written itself")
    if options.quick:
        raise UsageError("--resume: expected no --quick: what it measures is no part of another run")
    begun = options.resume.exists() and options.resume.stat().st_size  # empty, if it was killed at once
    return results.read(options.resume) if begun else None


def _start(
    device: torch.device, selection: Selection, options: argparse.Namespace, before: Results | None
) -> Results:
    """What was measured before, and where it goes on now."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    ceilings = measure_ceilings(device, selection.dtypes)
    with at_work(device):
        machine = read_machine(device)
    part = Part(machine, ceilings, now, options.quick)
    if before is None:
        return Results((part,))
    try:
        return results.continue_(before, part)
    except ValueError as error:
        raise UsageError(f"--resume {options.resume}: {error}") from None


def _own_file(measured: Results, selection: Selection) -> Path | None:
    """Where a run on a GPU that measures everything leaves what it has until it is complete."""
    machine = measured.machine
    if machine.gpu is None or selection.quick or not everything().keys() <= selection.keys():
        return None
    return results.unused(UNFINISHED / machine.folder / measured.file_name)


def _measure(
    measured: Results, selection: Selection, device: torch.device, path: Path | None, shown: Console
) -> tuple[Results, int]:
    """The results with what is selected, written as soon as it is measured; a code of ENDINGS, or 0."""
    done, code, part = 0, 0, measured.parts[-1]
    file = None if path is None else ResultFile(path, part)
    with stage(shown, "measuring", len(selection)) as advance:

        def begin(row: Row) -> None:
            nonlocal done
            advance(done, f"{', '.join(row.case)}: {row.impl}")
            done += 1
            if file is not None:
                file.begin(measured.with_rows((row,)).rows[-1])

        try:
            for more in run(selection, device, part.ceilings, begin):
                measured = measured.with_rows(more)
                if file is not None:
                    file.add(measured.rows[-len(more) :])
            advance(done, "")
        except KeyboardInterrupt:
            code = INTERRUPTED
        except DeviceLost as error:
            code = LOST
            _say(shown, f"The GPU was lost: {error}")
        finally:
            if file is not None:
                file.close()
    return measured, code


def _hint(measured: Results, file: Path) -> str:
    """How to measure the rest, or why that cannot be."""
    try:
        results.expect_continuable(measured.machine)
    except ValueError as error:
        return str(error)
    return f"--resume {file} measures the rest"


def _show(shown: Console, measured: Results, earlier: Results | None, name: str | None) -> None:
    for table in tables.op_tables(measured.rows):
        shown.print(table)
    if earlier is not None:
        shown.print(tables.comparison_table(measured, earlier, str(name)))
        _say(shown, tables.compared_with(measured, earlier, str(name)))
    _say(shown, *tables.failures(measured.rows))
