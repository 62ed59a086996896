"""The options of ``python -m bench``, by argparse: they need nothing that a GPU machine may lack."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.cases.own import read_own
from bench.cases.registry import CASES, FAMILIES, NOTHING, cases
from bench.harness.case import DTYPES, MODES, Case
from bench.harness.measure import SECONDS
from bench.harness.results import OURS
from bench.harness.selection import DEFAULT_DTYPES, DEFAULT_MODES, NONE, Selection

SMALL_DTYPES = ("fp32",)  # which show as much on a CPU, in half the time
QUICK_SECONDS = 0.02


def _baselines(cases: Sequence[Case]) -> list[str]:
    """Names of the baselines, each once."""
    return list(dict.fromkeys(name for case in cases for name in case.implementations if name != OURS))


DESCRIPTION = """\
Times every op and the model, its head alone and all of it, beside what people use today.

Each implementation is checked against the fp64 reference first; what fails its check is not timed, and
what cannot run says why. Without a GPU small sizes are timed on the CPU: that shows the benchmark, not the
kernels.
"""
EPILOG = f"""\
ops:        {", ".join(FAMILIES)}
shapes:     {", ".join(dict.fromkeys(case.shape for case in CASES))}
baselines:  {", ".join(_baselines(CASES))}

examples:
  python -m bench                                            everything, into bench/results/<gpu>/
  python -m bench --resume FILE                              what is not in FILE yet, and into FILE
  python -m bench --op deform_mix --shapes nyud --mode fwd   one op at one shape
  python -m bench --with mine.py                             contenders and shapes of your own
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
    add("--baseline", nargs="+", metavar="NAME", help="only these, or none (default: all)")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="where to write the results (default: bench/results/<gpu>/<date>-<commit>.jsonl if everything "
        "is measured on a GPU, nowhere otherwise)",
    )
    add(
        "--resume",
        type=Path,
        metavar="FILE",
        help="measure what is not in this file yet, and add it: of the same machine, versions and commit",
    )
    add("--compare", metavar="FILE|REVISION", help="results to compare with, or a git revision to measure")
    add(
        "--with",
        type=Path,
        metavar="FILE",
        dest="own",
        help="a Python file with contenders or shapes of your own, which are then measured unless --op or "
        "--shapes says otherwise",
    )
    add("--quick", action="store_true", help="small sizes and few repetitions: shows that everything runs")
    return made


def select(options: argparse.Namespace, device: torch.device) -> Selection:
    """The cases that the options ask for.

    Raises:
        OwnError: if the file with contenders and shapes cannot be used.
        UsageError: if an op, a shape or a baseline is unknown, or nothing is left.
    """
    own = NOTHING if options.own is None else read_own(options.own)
    known = cases(own)
    ops = options.op or list(dict.fromkeys(contender.op for contender in own.contenders))
    shapes = options.shapes or [shape.name for shape in own.shapes]
    small = options.quick or device.type == "cpu"
    chosen = [case for case in known if shapes or case.quick == small]
    for option, wanted, named in (
        ("--op", ops, lambda case: case.names),
        ("--shapes", shapes, lambda case: case.shape),
    ):
        for name in wanted:
            if not name or not any(name in named(case) for case in known):
                raise UsageError(f"{option} {name}: unknown; see python -m bench --help")
        if wanted:
            chosen = [case for case in chosen if any(name in named(case) for name in wanted)]
    modes = tuple(dict.fromkeys(options.mode))
    dtypes = tuple(dict.fromkeys(options.dtype or (SMALL_DTYPES if small else DEFAULT_DTYPES)))
    baselines, seconds = _named(options.baseline, known), QUICK_SECONDS if small else SECONDS
    selection = Selection(tuple(chosen), modes, dtypes, baselines, seconds, options.quick)
    for name in ops or [None]:
        of_name = tuple(case for case in chosen if name is None or name in case.names)
        if not len(replace(selection, cases=of_name)):
            what = "no op" if name is None else f"--op {name}"
            raise UsageError(f"nothing to measure: {what} has none of these shapes, dtypes and modes")
    return selection


def _named(baselines: list[str] | None, known: Sequence[Case]) -> tuple[str, ...] | None:
    """The baselines that were asked for; None for all."""
    if baselines is None:
        return None
    if NONE in baselines and len(baselines) > 1:
        raise UsageError(f"--baseline: expected {NONE} alone, or names")
    if unknown := [name for name in baselines if name not in (NONE, *_baselines(known))]:
        raise UsageError(f"--baseline {unknown[0]}: unknown; see python -m bench --help")
    return tuple(name for name in baselines if name != NONE)


def again(options: argparse.Namespace) -> list[str]:
    """The options that make another revision measure the same."""
    lists = {"--op": options.op, "--mode": options.mode, "--dtype": options.dtype}
    lists |= {"--shapes": options.shapes, "--baseline": [NONE]}  # ours alone is compared
    lists |= {"--with": [str(options.own.absolute())] if options.own else []}
    words = [word for option, values in lists.items() if values for word in (option, *values)]
    return [*words, "--quick"] if options.quick else words
