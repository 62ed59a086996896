"""Results as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.harness.case import GRAPH, LOOP
from bench.harness.results import OK, OURS, Machine, Results, Row


def op_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """A table for each op: every implementation, and how many times as long as ours it takes."""
    for op in dict.fromkeys(row.op for row in rows):
        yield _op_table(op, [row for row in rows if row.op == op])


def machine_lines(results: Results) -> list[str]:
    """What was measured on, and what it reaches itself."""
    machine = results.machine
    lines = [_machine(machine)]
    if len(results.parts) > 1:
        lines.append(f"Call {len(results.parts)} of a run that began {results.measured} UTC.")
    ceilings = results.parts[-1].ceilings
    if ceilings.copy is not None:
        rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in ceilings.matrix.items())
        lines.append(f"Measured in this call: copy {ceilings.copy / 1e9:.4g} GB/s; matrix products {rates}")
    if machine.gpu is None:
        lines.append(f"{on_a_cpu(machine)}: these times say nothing about the kernels.")
    return lines


def on_a_cpu(machine: Machine) -> str:
    """Which code a CPU ran, as the beginning of a sentence."""
    ran = "Triton's interpreter" if machine.interpreted else "their references"
    return f"On a CPU our ops run {ran}"


def compared_with(now: Results, earlier: Results, name: str) -> str:
    """What another run was measured on, and what of that is different now."""
    then, here = earlier.machine, now.machine
    pairs = {
        "device": (_device(then), _device(here)),
        "torch": (then.torch, here.torch),
        "triton": (then.triton, here.triton),
    }
    different = ", ".join(what for what, (before, after) in pairs.items() if before != after)
    warning = f". Not only the code is another now: {different}" if different else ""
    return f"{name} was measured on {_machine(then)}{warning}"


def comparison_table(now: Results, earlier: Results, name: str) -> Table:
    """Our times now beside those of another run, matched by op, shape, dtype, mode and timer.

    Times whose 20 % and 80 % quantiles overlap are not told apart.
    """
    table = _table(f"ours, compared with {name}")
    for title in ("op", "shape", "dtype", "mode", "timer"):
        table.add_column(title)
    for title in ("ms then", "ms now", "then / now"):
        table.add_column(title, justify="right")
    before = {_key(row): row for row in earlier.rows if row.impl == OURS}
    for row in now.rows:
        if row.impl != OURS:
            continue
        other = before.get(_key(row))
        then = "not there" if other is None else _time(other)
        ratio = "no difference" if other is not None and _overlap(other, row) else _ratio(other, row)
        table.add_row(*_key(row)[:4], row.timer or "", then, _time(row), ratio)
    return table


def _op_table(op: str, rows: Sequence[Row]) -> Table:
    table = _table(op)
    table.add_column("", no_wrap=True)
    titles = ["ms", "20–80 %", "runs", "over ours", "peak MiB", "% of light", "error"]
    with_images = any(row.images is not None for row in rows)
    for title in [*titles, "images/s"] if with_images else titles:
        table.add_column(title, justify="right", no_wrap=True)
    ours = {(*_key(row), row.part): row for row in rows if row.impl == OURS}
    timed = {row.case for row in rows if row.timer is not None}
    for key in dict.fromkeys(_key(row) for row in rows if row.timer is not None or row.case not in timed):
        _, shape, dtype, mode, timer = key
        table.add_section()
        told = f"  [dim]{timer}[/]" if timer in (GRAPH, LOOP) else ""
        table.add_row(f"[bold]{shape}, {dtype}, {mode}[/]{told}")
        for row in rows:
            # What was not timed at all stands among whatever was.
            if _key(row) == key or (row.case == key[:4] and row.timer is None):
                cells = _cells(row, ours.get((*key, row.part)))
                speed = "" if not row.ms or row.images is None else _digits(1e3 * row.images / row.ms)
                table.add_row(*cells, *([speed] if with_images else []))
    return table


def _cells(row: Row, ours: Row | None) -> list[str]:
    return [
        f"  {row.impl}" + (f", call {row.part + 1}" if row.part else ""),
        _time(row),
        "" if row.ms_p20 is None else f"{_digits(row.ms_p20)}–{_digits(row.ms_p80)}",
        "" if row.runs is None else str(row.runs),
        "" if row.impl == OURS else _ratio(row, ours),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        "" if row.speed_of_light is None else f"{100 * row.speed_of_light:.0f}",
        "" if row.rel_error is None else f"{row.rel_error:.0e}",
    ]


def failures(rows: Iterable[Row]) -> list[str]:
    """A line for every reason why something has no times, with how often it was met."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row.status != OK:
            key = (row.op, row.impl, row.status)
            counts[key] = counts.get(key, 0) + 1
    return [f"{op}: {impl}: {status} ({count}×)" for (op, impl, status), count in counts.items()]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)


def _key(row: Row) -> tuple[str | None, ...]:
    return (*row.case, row.timer)


def _time(row: Row) -> str:
    if row.ms is not None:
        return _digits(row.ms)
    # A column as wide as a reason would leave the others none; ``failures`` has the reasons.
    return {"check failed": "WRONG", "failed": "failed"}.get(row.status.split(":")[0], "–")


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def _ratio(slow: Row | None, fast: Row | None) -> str:
    if slow is None or fast is None or not slow.ms or not fast.ms:
        return ""
    return f"{slow.ms / fast.ms:.2f}×"


def _overlap(one: Row, other: Row) -> bool:
    quantiles = (one.ms_p20, one.ms_p80, other.ms_p20, other.ms_p80)
    return None not in quantiles and one.ms_p20 <= other.ms_p80 and other.ms_p20 <= one.ms_p80


def _device(machine: Machine) -> str:
    return machine.gpu or f"CPU: {machine.cpu}"


def _machine(machine: Machine) -> str:
    parts = [_device(machine), f"torch {machine.torch}", f"Python {machine.python}"]
    named = {
        "triton": machine.triton,
        "CUDA": machine.cuda,
        "driver": machine.driver,
        "clocks": machine.clocks,
    }
    parts += [f"{name} {value}" for name, value in named.items() if value is not None]
    parts.append(f"commit {machine.commit[:10]}{', with changes' if machine.dirty else ''}")
    return ", ".join(parts)
