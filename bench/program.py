"""The command line of ``python -m bench``, by argparse: it needs nothing that a GPU machine may lack."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from bench import report, results, tables
from bench.cases import DTYPES, MODES, Case
from bench.ceilings import at_work, measure_ceilings
from bench.compare import CompareError, earlier_results
from bench.machine import REPOSITORY, read_machine
from bench.measure import SECONDS
from bench.results import OURS, Key, Part, Results, Row
from bench.run import CASES, FAMILIES, DeviceLost, Selection, is_quick, known_shapes, run
from degmix.progress import stage

FAILURE = 1
USER_ERROR = 2
LOST = 3
INTERRUPTED = 130
ENDINGS = {LOST: "The GPU answers no more", INTERRUPTED: "Interrupted"}
LOG_WIDTH = 110  # columns, where there is no terminal that has its own
DEFAULT_MODES = ("fwd", "fwdbwd")
DEFAULT_DTYPES = ("bf16", "fp32")
SMALL_DTYPES = ("fp32",)  # which show as much on a CPU, in half the time
QUICK_SECONDS = 0.02
BASELINES = tuple(dict.fromkeys(name for case in CASES for name in case.implementations if name != OURS))
NONE = "none"
UNFINISHED = REPOSITORY / "runs" / "bench"

DESCRIPTION = """\
Times every op and the model, its head alone and all of it, beside what people use today.

Each implementation is checked against the fp64 reference first; what fails its check is not timed, and
what cannot run says why. Without a GPU small sizes are timed on the CPU: that shows the benchmark, not the
kernels.
"""
EPILOG = f"""\
ops:        {", ".join(family.FAMILY for family in FAMILIES)}
shapes:     {", ".join(known_shapes())}
baselines:  {", ".join(BASELINES)}

examples:
  python -m bench                                            everything, into bench/results/<gpu>/
  python -m bench --resume FILE                              likewise into FILE, what is not in it yet
  python -m bench --op deform_mix --shapes nyud --mode fwd   one op at one shape
  python -m bench --op gating --compare HEAD~1               against the previous commit, measured now
"""


class UsageError(ValueError):
    """Command-line values that make no sense; the message is one sentence."""


def parser() -> argparse.ArgumentParser:
    """The options, with their help."""
    made = argparse.ArgumentParser(
        "python -m bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--op", nargs="+", default=[], metavar="OP", help="families or ops, such as gating or gated_mlp")
    add(
        "--mode",
        nargs="+",
        choices=MODES,
        default=list(DEFAULT_MODES),
        help="forward, backward alone, or both together (default: fwd fwdbwd)",
    )
    add(
        "--dtype",
        nargs="+",
        choices=tuple(DTYPES),
        metavar="DTYPE",
        help="bf16, fp16, fp32: of our inputs (default: bf16 fp32; at small sizes fp32)",
    )
    add(
        "--shapes",
        nargs="+",
        default=[],
        metavar="SHAPE",
        help="every shape whose name contains one of these (default: the real ones on a GPU)",
    )
    add(
        "--baseline",
        nargs="+",
        choices=(*BASELINES, NONE),
        metavar="NAME",
        help="only these, or none (default: all)",
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="where to write the results (default: bench/results/<gpu>/<date>-<commit>.json if everything "
        "is measured on a GPU, nowhere otherwise)",
    )
    add(
        "--resume",
        type=Path,
        metavar="FILE",
        help="measure what is not in this file yet, and add it: of the same machine, versions and commit",
    )
    add("--compare", metavar="FILE|REVISION", help="results to compare with, or a git revision to measure")
    add("--quick", action="store_true", help="small sizes and few repetitions: shows that everything runs")
    return made


def select(options: argparse.Namespace, device: torch.device) -> Selection:
    """The cases that the options ask for.

    Raises:
        UsageError: if an op or a shape is unknown, or nothing is left.
    """
    small = options.quick or device.type == "cpu"
    cases = [case for case in CASES if options.shapes or is_quick(case) == small]
    for option, wanted, names in (
        ("--op", options.op, _op_names),
        ("--shapes", options.shapes, _shape_names),
    ):
        for name in wanted:
            if not name or not any(name in names(case) for case in CASES):
                raise UsageError(f"{option} {name}: unknown; see python -m bench --help")
        if wanted:
            cases = [case for case in cases if any(name in names(case) for name in wanted)]
    baselines = options.baseline
    if baselines is not None:
        if NONE in baselines and len(baselines) > 1:
            raise UsageError(f"--baseline: expected {NONE} alone, or names")
        baselines = tuple(name for name in baselines if name != NONE)
    dtypes = options.dtype or (SMALL_DTYPES if small else DEFAULT_DTYPES)
    modes, dtypes = (tuple(dict.fromkeys(names)) for names in (options.mode, dtypes))
    seconds = QUICK_SECONDS if small else SECONDS
    selection = Selection(tuple(cases), modes, dtypes, baselines, seconds, options.quick)
    for name in options.op or [None]:
        of_name = [case for case in cases if name is None or name in _op_names(case)]
        if not len(replace(selection, cases=tuple(of_name))):
            what = "no op" if name is None else f"--op {name}"
            raise UsageError(f"nothing to measure: {what} has none of these shapes, dtypes and modes")
    return selection


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; its exit code.

    Returns:
        0; 1 if one of our ops failed; 2 for a user's mistake; 3 if the GPU answers no more; 130 if it was
        interrupted.

    Raises:
        KeyboardInterrupt: if nothing was being measured.
    """
    options = parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    try:
        return benchmark(options, console)
    except (UsageError, CompareError, ValueError, OSError) as error:
        Console(stderr=True).print(f"bench: {error}", soft_wrap=True, highlight=False, markup=False)
        return USER_ERROR


def benchmark(options: argparse.Namespace, console: Console) -> int:
    """Measure, show and write what the options ask for; the exit code as of :func:`main`."""
    for given in (options.json, options.resume):
        if given is not None:
            results.expect_writable(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    selection = select(options, device)
    everything = select(parser().parse_args([]), device)
    headline = everything.headline().keys()
    before = _resumed(options)
    earlier = None
    if options.compare is not None:
        console.print(f"Reading or measuring {options.compare}.", soft_wrap=True, highlight=False)
        earlier = earlier_results(options.compare, _again(options))
    measured = _start(device, selection, options, before)
    if before is not None:
        selection = replace(selection, done=measured.keys, repeatable=measured.repeatable)
    file = (
        options.json
        or options.resume
        or _progress_file(measured, everything.keys() <= selection.keys() and not options.quick)
    )
    for line in tables.machine_lines(measured):
        console.print(line, soft_wrap=True, highlight=False)
    measured, code = _measure(measured, selection, headline, device, file, console)
    _show(console, measured, earlier, options.compare)
    if file is not None and options.json is None and options.resume is None and measured.complete:
        try:
            file = results.publish(file, measured)
        except ValueError as error:  # of uncommitted code
            console.print(f"Not among the published results: {error}", soft_wrap=True, highlight=False)
    kept = "in no file: --json FILE keeps them" if file is None else str(file)
    console.print(f"Results: {kept}", soft_wrap=True, highlight=False)
    if file is not None:
        for line in report.write_beside(measured, file):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    if code != 0:
        left = len(replace(selection, done=measured.keys, repeatable=frozenset()))
        again = "" if file is None or options.quick else f"; {_hint(measured, file)}"
        text = f"{ENDINGS[code]}: {left} measurements are left{again}."
        console.print(text, soft_wrap=True, highlight=False)
        return code
    return FAILURE if any(row.impl == OURS and row.failed for row in measured.rows) else 0


def _start(
    device: torch.device, selection: Selection, options: argparse.Namespace, before: Results | None
) -> Results:
    """What was measured before, and where it goes on now."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    ceilings = measure_ceilings(device, selection.dtypes)
    with at_work(device):
        machine = read_machine(device)
    if before is None:
        return Results(machine, ceilings, (), quick=options.quick, measured=now)
    try:
        return results.continue_(before, Part(machine, ceilings, now))
    except ValueError as error:
        raise UsageError(f"--resume {options.resume}: {error}") from None


def _measure(
    measured: Results,
    selection: Selection,
    headline: frozenset[Key],
    device: torch.device,
    file: Path | None,
    console: Console,
) -> tuple[Results, int]:
    """The results with what is selected, written after every measurement; a code of ENDINGS, or 0."""
    done, code = 0, 0
    if file is not None:
        results.write(measured, file)  # rather now than after the first measurement, if it cannot be
    with stage(console, "measuring", len(selection)) as advance:

        def begin(row: Row) -> None:
            nonlocal done
            advance(done, f"{', '.join(row.case)}: {row.impl}")
            done += 1
            if file is not None:
                results.begin(row.key, file)

        try:
            for more in run(selection, device, measured.parts[-1].ceilings, begin):
                measured = measured.with_rows(more)
                measured = replace(measured, complete=headline <= measured.keys and not measured.quick)
                if file is not None:
                    results.write(measured, file)
            advance(done, "")
        except KeyboardInterrupt:
            code = INTERRUPTED
        except DeviceLost as error:
            code = LOST
            console.print(f"The GPU was lost: {error}", soft_wrap=True, highlight=False, markup=False)
    if file is not None:
        results.end(file)
    return measured, code


def _hint(measured: Results, file: Path) -> str:
    """How to measure the rest, or why that cannot be."""
    try:
        results.expect_continuable(measured.machine)
    except ValueError as error:
        return str(error)
    return f"--resume {file} measures the rest"


def _resumed(options: argparse.Namespace) -> Results | None:
    """What is in the file that is to be continued; None if there is none yet."""
    if options.resume is None:
        return None
    if options.json is not None:
        raise UsageError("--json, --resume: expected one of them: a file that is continued is written itself")
    if options.quick:
        raise UsageError("--resume: expected no --quick: what it measures is no part of another run")
    if not options.resume.exists():
        return None
    return results.with_unended(results.read(options.resume), options.resume)


def _show(console: Console, measured: Results, earlier: Results | None, name: str | None) -> None:
    for table in tables.op_tables(measured.rows):
        console.print(table)
    if earlier is not None:
        console.print(tables.comparison_table(measured, earlier, str(name)))
        line = tables.compared_with(measured, earlier, str(name))
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    for line in tables.failures(measured.rows):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _op_names(case: Case) -> tuple[str, ...]:
    return case.family, case.op, case.op.partition(" (")[0]


def _shape_names(case: Case) -> str:
    return case.shape


def _again(options: argparse.Namespace) -> list[str]:
    """The options that make another revision measure the same."""
    lists = {"--op": options.op, "--mode": options.mode, "--dtype": options.dtype}
    lists |= {"--shapes": options.shapes, "--baseline": [NONE]}  # ours alone is compared
    again = [word for option, values in lists.items() if values for word in (option, *values)]
    return [*again, "--quick"] if options.quick else again


def _progress_file(measured: Results, everything: bool) -> Path | None:
    """Where a run on a GPU that measures everything leaves what it has until it is complete."""
    machine = measured.machine
    if machine.gpu is None or not everything:
        return None
    return results.unused(UNFINISHED / machine.folder / measured.file_name)
