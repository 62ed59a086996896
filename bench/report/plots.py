"""The report's pictures: speed-up bars, a roofline, the model's memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.harness.case import LOOP
from bench.harness.results import OURS, Results, Row
from bench.report.speedups import SHOWN_MODES, Comparison, model_calls, shown

COLOURS = matplotlib.colormaps["tab20"].colors
INCH_PER_BAR = 0.17
MIB = 2**20


def names(results: Results) -> list[str]:
    """File names of the pictures that the results are enough for."""
    return [name for name, (_, enough) in PICTURES.items() if enough(results)]


def draw(results: Results, folder: Path, prefix: str = "") -> list[Path]:
    """Draw every picture that the results are enough for; of the others none stays from an earlier result."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = names(results)
    for name, (make, _) in PICTURES.items():
        path = folder / (prefix + name)
        if name in drawn:
            figure = make(results)
            figure.suptitle(_title(figure, results), fontsize=10)
            # No date or version in the file: the same numbers give the same bytes.
            figure.savefig(path, dpi=120, metadata={"Software": None})
        else:
            path.unlink(missing_ok=True)
    return [folder / (prefix + name) for name in drawn]


def _figure(label: str, width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", label=label)


def _title(figure: Figure, results: Results) -> str:
    machine = results.machine
    commit = machine.commit[:10] + (" with changes" if machine.dirty else "")
    return f"{figure.get_label()}\n{machine.gpu or 'CPU'}, torch {machine.torch}, {commit}"


# --- Speed-up ----------------------------------------------------------------------------------------------


def _timed(results: Results) -> list[Comparison]:
    return [call for call in shown(results) if any(call.speed_up(other) for other in call.others)]


def _speed_up(results: Results) -> Figure:
    calls = _timed(results)
    modes = [mode for mode in SHOWN_MODES if any(call.ours.mode == mode for call in calls)]
    baselines = list(dict.fromkeys(other.impl for call in calls for other in call.others))
    places, ticks = _places(calls)
    height = 1.6 + INCH_PER_BAR * (len(places) + len(ticks))
    figure = _figure("Times as fast as each baseline", 1.5 + 5.0 * len(modes), height)
    panels = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, mode in zip(panels, modes, strict=True):
        for call in (call for call in calls if call.ours.mode == mode):
            for other in call.others:
                ratio, place = call.speed_up(other), places[call.ours.op, other.impl]
                if ratio is not None:
                    panel.barh(place, ratio - 1, left=1, color=_colour(baselines, other.impl))
                text = " no time" if ratio is None else f" {ratio:.2f}×"
                panel.text(max(ratio or 1, 1), place, text, va="center", fontsize=6)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(title=mode, xscale="log", xlabel="← slower     time of the baseline ÷ ours     faster →")
        panel.margins(x=0.15, y=0.01)
    panels[0].set_yticks(list(ticks.values()), list(ticks), fontsize=7)
    panels[0].invert_yaxis()
    _legend(figure, baselines)
    return figure


def _places(calls: Sequence[Comparison]) -> tuple[dict[tuple[str, str], int], dict[str, float]]:
    """(op, baseline) → row of its bar, ops one row apart; and label of an op → the middle of its bars."""
    places, ticks, row = {}, {}, 0
    for op in dict.fromkeys(call.ours.op for call in calls):
        of_op = [call for call in calls if call.ours.op == op]
        baselines = list(dict.fromkeys(other.impl for call in of_op for other in call.others))
        ours = of_op[0].ours
        ticks[f"{op}\n{ours.shape}, {ours.dtype}"] = row + (len(baselines) - 1) / 2
        for name in baselines:
            places[op, name] = row
            row += 1
        row += 1
    return places, ticks


# --- Roofline ----------------------------------------------------------------------------------------------


def _points(results: Results) -> list[Row]:
    return [
        row
        for row in results.rows
        if row.impl == OURS
        and row.ms
        and row.bytes
        and row.flops is not None
        and results.parts[row.part].ceilings.copy is not None
        and row.dtype in results.parts[row.part].ceilings.matrix
    ]


def _roofline(results: Results) -> Figure:
    """Bytes per second over FLOPs per byte, so that ops without products have their place, too.

    Every dtype has a column of panels, every call, which has ceilings of its own, a row.
    """
    rows = _points(results)
    dtypes, ops = list(dict.fromkeys(row.dtype for row in rows)), list(dict.fromkeys(row.op for row in rows))
    parts = list(dict.fromkeys(row.part for row in rows))
    label = "Roofline: fewest bytes ÷ time, ours"
    figure = _figure(label, 4.0 + 4.5 * len(dtypes), 4.5 * len(parts))
    panels = figure.subplots(len(parts), len(dtypes), sharey=True, squeeze=False)
    for panel, (part, dtype) in zip(panels.flat, itertools.product(parts, dtypes), strict=True):
        listed = [row for row in rows if (row.part, row.dtype) == (part, dtype)]
        if not listed:
            panel.remove()
            continue
        ceilings = results.parts[part].ceilings
        ridge = ceilings.matrix[dtype] / ceilings.copy
        highest = 2 * max(ridge, *(row.flops / row.bytes for row in listed))
        intensity = np.concatenate([[0.0], np.geomspace(1e-1, highest, 200)])
        ceiling = np.full_like(intensity, ceilings.copy)
        ceiling[1:] = np.minimum(ceiling[1:], ceilings.matrix[dtype] / intensity[1:])
        panel.plot(intensity, ceiling / 1e9, color="black", linewidth=1)
        for row in listed:
            panel.plot(
                row.flops / row.bytes,
                row.bytes / row.ms / 1e6,
                "o" if row.mode == SHOWN_MODES[0] else "^",
                color=_colour(ops, row.op),
                markersize=5,
                clip_on=False,
            )
        panel.set_xscale("symlog", linthresh=1.0)
        title = dtype + (f", call {part + 1}" if part else "")
        panel.set(title=title, yscale="log", xlim=(0, highest), xlabel="FLOPs per byte")
        panel.grid(alpha=0.3)
    figure.supylabel("GB/s   (● forward, ▲ with backward)", fontsize=10)
    _legend(figure, ops)
    return figure


# --- The model's memory ------------------------------------------------------------------------------------


def _model_rows(results: Results) -> list[Row]:
    # A loop has another time and the same memory.
    calls = [call for call in model_calls(results) if call.ours.timer != LOOP]
    return [row for call in calls for row in (call.ours, *call.others) if row.peak_bytes is not None]


def _model_memory(results: Results) -> Figure:
    rows = _model_rows(results)
    modes = list(dict.fromkeys(row.mode for row in rows))
    impls = list(dict.fromkeys(row.impl for row in rows))
    figure = _figure("Peak memory of the model", 1.5 + 5.0 * len(modes), 4.5)
    for panel, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        listed = [row for row in rows if row.mode == mode]
        calls = list(dict.fromkeys(_model_call(row) for row in listed))
        width = 1 / (len(impls) + 1)
        for row in listed:
            side = impls.index(row.impl) - len(impls) / 2 + 0.5
            place = calls.index(_model_call(row)) + width * side
            panel.bar(place, row.peak_bytes / MIB, width, color=_colour(impls, row.impl))
        panel.set_xticks(range(len(calls)), calls, rotation=30, ha="right", fontsize=7)
        panel.set(title=mode, ylabel="MiB")
    _legend(figure, impls)
    return figure


def _model_call(row: Row) -> str:
    return f"{row.op}\n{row.shape}, {row.dtype}"


def _colour(names: Sequence[str], name: str) -> tuple[float, float, float]:
    return COLOURS[names.index(name) % len(COLOURS)]


def _legend(figure: Figure, names: Sequence[str]) -> None:
    handles = [Patch(color=_colour(names, name), label=name) for name in names]
    figure.legend(handles=handles, loc="outside right upper", fontsize=7, frameon=False)


PICTURES: dict[str, tuple[Callable[[Results], Figure], Callable[[Results], bool]]] = {
    "speed-up.png": (_speed_up, lambda results: bool(_timed(results))),
    "roofline.png": (_roofline, lambda results: bool(_points(results))),
    "model-memory.png": (_model_memory, lambda results: bool(_model_rows(results))),
}
"""File name → what draws it, and whether the results are enough for it."""
