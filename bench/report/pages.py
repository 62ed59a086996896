"""What a result file says, as the READMEs' tables and as pictures: ``python -m bench.report --help``.

Everything between the two markers of README.md, of bench/README.md and of every op family's README.md is
written here, nothing there is typed by hand.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench.cases.op import family_of
from bench.cases.registry import CASES, is_complete
from bench.harness.case import LOOP
from bench.harness.command import USER_ERROR
from bench.harness.machine import REPOSITORY
from bench.harness.results import OURS, PUBLISHED, UNKNOWN, Machine, Results, Row, read, unused
from bench.report import goals, predicted
from bench.report.speedups import Comparison, model_calls, shown
from bench.report.tables import on_a_cpu
from degmix_kernels.registry import OPS

README = REPOSITORY / "README.md"
BENCH_README = REPOSITORY / "bench" / "README.md"
PAGES = tuple(sorted((REPOSITORY / "degmix_kernels").glob("*/README.md")))  # one for each family of ops
PICTURES = Path("docs") / "benchmark"  # below README's folder
BEGIN = "<!-- benchmark: written by python -m bench.report, not by hand -->"
END = "<!-- end of benchmark -->"
NO_RESULT = """\
No speed is quoted here yet: no GPU has timed the kernels. `python -m bench` on a machine with a GPU leaves a
result file, `python -m bench.report` then puts its numbers here."""
RULE = """\
Median times, at NYUD-v2's maps where an op has them. Speed of light: the time that the call's bytes and
operations need at the ceilings, over its own."""
TRAINING = Path("training") / "training.json"
PROFILE = "profile.md"
COMMAND = "python -m bench.report"
MIB = 2**20


def section(results: Results, source: str, pictures: Sequence[str]) -> str:
    """The report in Markdown; ``source``, the file, and the pictures are where its reader finds them."""
    lines = [_provenance(results, source), ""]
    ops, model = shown(results), model_calls(results)
    if ops:
        lines += [*_op_table(ops), "", RULE, ""]
    if model:
        lines += [
            "| model | call | images/s | peak MiB | times as fast as | of the peak memory of |",
            "|---|---|---:|---:|---|---|",
            *(_model_line(call) for call in model),
            "",
        ]
    lines += [f"![{Path(name).stem.replace('-', ' ')}]({name})\n" for name in pictures]
    if results.failed:
        calls = sum(row.impl == OURS for row in results.rows)
        lines += [f"{results.failed} of {calls} calls of ours failed; the file says why.", ""]
    return "\n".join(lines).rstrip("\n")


def _provenance(results: Results, source: str) -> str:
    machine, parts = results.machine, results.parts
    drivers = " and ".join(dict.fromkeys(part.machine.driver for part in parts if part.machine.driver))
    measured = ", ".join(_versions(replace(machine, driver=drivers)))
    text = f"Measured on {_device(machine)}, {measured}: [{Path(source).name}]({source})."
    if machine.gpu is None:
        text += f" {on_a_cpu(machine)}: these times say nothing about the kernels."
    if results.ceilings.copy is not None:
        rates = results.ceilings.matrix.items()
        products = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in rates)
        text += (
            f" Ceilings, measured with it: copy {results.ceilings.copy / 1e12:.3g} TB/s; products {products}."
        )
    if machine.gpu is not None and not is_complete(results):
        text += " The run was stopped before its end: a baseline that is missing here was not measured."
    if len(parts) > 1:
        text += (
            f" In {len(parts)} calls, each with ceilings of its own; ratios are of times of the same call."
        )
    return text


def _versions(machine: Machine) -> list[str]:
    named = {"torch": machine.torch, "Triton": machine.triton, "CUDA": machine.cuda, "driver": machine.driver}
    changes = " with changes" if machine.dirty else ""
    given = [f"{name} {value}" for name, value in named.items() if value]
    return [*given, f"commit {machine.commit[:10]}{changes}"]


def _device(machine: Machine) -> str:
    return machine.gpu or f"a CPU ({machine.cpu})"


def _op_table(calls: Sequence[Comparison]) -> list[str]:
    return [
        "| op | call | ms | of the speed of light | times as fast as |",
        "|---|---|---:|---:|---|",
        *(_op_line(call) for call in calls),
    ]


def family_section(results: Results | None, family: str, source: str) -> str:
    """The calls of one family's ops in Markdown; ``source`` is where its reader finds the file."""
    names = {op.name for op in OPS if family_of(op) == family}
    calls = [] if results is None else shown(results)
    calls = [call for call in calls if call.ours.op.partition(" (")[0] in names]
    if not calls:
        return "No GPU has timed these ops yet."
    machine = results.machine
    where = f"{_device(machine)}, commit {machine.commit[:10]}: [{Path(source).name}]({source})"
    return "\n".join([f"`python -m bench`, {where}.", "", *_op_table(calls)])


def _op_line(call: Comparison) -> str:
    row = call.ours
    light = "–" if row.speed_of_light is None else f"{row.speed_of_light:.0%}"
    name = f"`{row.op}` | {row.shape}, {row.dtype}, {row.mode}"
    return f"| {name} | {_time(row)} | {light} | {_ratios(call)} |"


def _model_line(call: Comparison) -> str:
    row = call.ours
    speed = f"{1e3 * row.images / row.ms:.4g}" if row.ms else _time(row)
    peak = "–" if row.peak_bytes is None else f"{row.peak_bytes / MIB:.0f}"
    shares = {other.impl: call.share_of_peak(other) for other in call.others}
    name = f"{row.op} | {row.shape}, {row.dtype}, {row.mode}"
    name += ", launches included" if row.timer == LOOP else ""
    return f"| {name} | {speed} | {peak} | {_ratios(call)} | {_each(shares, '.0%')} |"


def _time(row: Row) -> str:
    if row.ms is None:
        return row.status.partition(":")[0]
    return f"{row.ms:.3g}" if row.ms < 1000 else f"{row.ms:.0f}"


def _ratios(call: Comparison) -> str:
    return _each({other.impl: call.speed_up(other) for other in call.others}, ".2f", "×")


def _each(ratios: Mapping[str, float | None], form: str, unit: str = "") -> str:
    """Every baseline with its ratio, or with a dash where there is none."""
    return ", ".join(
        f"{name} {'–' if ratio is None else f'{ratio:{form}}{unit}'}" for name, ratio in ratios.items()
    )


def newest_of_a_gpu(folder: Path) -> tuple[Path, Results] | None:
    """The result file of a GPU below a folder that was measured last; None without one.

    A complete file is preferred to a newer one that is not.

    Raises:
        ValueError: if a file that is named like one, by its date, is no result file.
    """
    files = [(path, read(path)) for path in folder.glob("*/[0-9]*.jsonl")]
    of_gpus = [each for each in files if each[1].machine.gpu is not None]
    return max(of_gpus, key=lambda each: (is_complete(each[1]), each[1].measured), default=None)


def publish(file: Path, results: Results) -> Path:
    """Move a result file to those that the report reads, under the name that its date and commit give it.

    Raises:
        OSError: if it cannot be moved.
        ValueError: if the report would not take it.
    """
    if results.machine.gpu is None or not is_complete(results):
        raise ValueError(f"{file}: expected a complete run on a GPU")
    if results.machine.commit == UNKNOWN or results.machine.dirty:
        raise ValueError(f"{file}: expected the run of a known commit, without changes")
    target = unused(PUBLISHED / results.machine.folder / results.file_name)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(file, target)
    return target


def _on_the_same_gpu(folder: Path) -> list[str]:
    """What else was left beside a result file: curves of training, and a profile of its step."""
    lines = []
    curves = folder / TRAINING
    if curves.is_file():
        from bench.report.curves import PLOT_NAME, curves_of

        plot = curves.with_name(PLOT_NAME).relative_to(BENCH_README.parent).as_posix()
        machine, what, runs = curves_of(curves)
        versions = ", ".join(_versions(machine))
        lines += ["", f"`python -m bench.training`, {what}, {versions}:", ""]
        lines += [*(f"- {name}: {curve}" for name, curve in runs.items()), "", f"![loss curves]({plot})"]
    profile = folder / PROFILE
    if profile.is_file():
        lines += ["", f"`python -m bench.profile_step`: {profile.read_text(encoding='utf-8').rstrip()}"]
    return lines


def replaced(path: Path, generated: str) -> tuple[str, str]:
    """A file's text, and the same with something else between its markers.

    Raises:
        OSError: if there is no such file.
        ValueError: if the markers are not both there, once, in this order.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"{path.name}: expected one {BEGIN} and, below it, one {END}")
    return text, f"{before}{BEGIN}\n{generated}\n{END}{after}"


def write_beside(results: Results, path: Path) -> list[str]:
    """Write a result file's tables beside it, and pictures if matplotlib is there; says which, in lines."""
    target, prefix = path.with_suffix(".md"), f"{path.stem}-"
    try:
        from bench.report import plots
    except ImportError as error:
        _write_tables(results, path.name, [], target)
        return [str(target), f"No pictures: {error}"]
    _write_tables(results, path.name, [prefix + name for name in plots.names(results)], target)
    return [str(target), *map(str, plots.draw(results, path.parent, prefix))]


def _write_tables(results: Results, source: str, pictures: Sequence[str], target: Path) -> None:
    lines = [section(results, source, pictures), "", *goals.table(results), ""]
    target.write_text("\n".join(lines), "utf-8")


def report(check: bool) -> int:
    """Bring all pages and the pictures up to date, or only say whether the pages are."""
    found = newest_of_a_gpu(PUBLISHED)
    if found is None:
        results, source = None, ""
        generated, lines = NO_RESULT, goals.table(None)
    else:
        from bench.report import plots

        path, measured = found
        known = {case.op for case in CASES}  # some are gone since
        results = replace(measured, rows=tuple(row for row in measured.rows if row.op in known))
        pictures = [(PICTURES / name).as_posix() for name in plots.names(results)]
        source = path.relative_to(README.parent).as_posix()
        generated = section(results, source, pictures)
        lines = [*goals.table(results), *predicted.table(results), *_on_the_same_gpu(path.parent)]
    texts = {README: generated, BENCH_README: "\n".join(lines)}
    texts |= {page: family_section(results, page.parent.name, f"../../{source}") for page in PAGES}
    changed = {path: new for path in texts for old, new in [replaced(path, texts[path])] if new != old}
    if check:
        for path in changed:
            name = path.relative_to(README.parent)
            print(f"{name} is not what the newest result gives: {COMMAND} rewrites it", file=sys.stderr)
        return int(bool(changed))
    if found is None:
        print(
            "no result file of a GPU under bench/results: python -m bench on a machine with a GPU makes one"
        )
    else:
        drawn = plots.draw(results, README.parent / PICTURES)
        print(f"{path.name}: {len(texts)} pages, and {len(drawn)} pictures in {PICTURES}")
    for path, new in changed.items():
        path.write_text(new, encoding="utf-8")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 if ``--check`` finds a README stale, 2 for a file that is no result file."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Write the benchmark tables of all README.md, and draw the pictures, "
        "from the newest result file of a GPU under bench/results, a complete one if there is one.",
    )
    add = parser.add_argument
    add("file", nargs="?", type=Path, help="report this file instead, beside it; the pages stay as they are")
    add("--check", action="store_true", help="only say whether they are up to date")
    add(
        "--publish",
        type=Path,
        metavar="FILE",
        help="move this complete file of a GPU to bench/results, named by its date and commit, first",
    )
    chosen = parser.parse_args(arguments)
    if sum((chosen.check, chosen.file is not None, chosen.publish is not None)) > 1:
        parser.error("expected one of FILE, --check and --publish FILE")
    try:
        if chosen.publish is not None:
            print(publish(chosen.publish, read(chosen.publish)))
        if chosen.file is None:
            return report(chosen.check)
        print(*write_beside(read(chosen.file), chosen.file), sep="\n")
        return 0
    except (ImportError, OSError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return USER_ERROR
