"""Curves of training: the files that ``python -m bench.training`` leaves and the report shows."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.figure import Figure

from bench.harness.results import OK, Machine
from degmix.files import atomic_file
from degmix.records import convert

JSON_NAME, PLOT_NAME = "training.json", "training.png"
NOTICEABLE = 0.03  # share of the time spent waiting for data that the plot names
LONGEST_REASON = 60  # characters


@dataclass(frozen=True)
class Curve:
    """What one run reached.

    Attributes:
        status: "ok" if it did all its steps, otherwise why not.
        steps_asked: the steps it was to do.
        steps_done: the steps it did.
        images_per_second: in the second half of those, when all is compiled; waiting for data included.
        waiting_for_data: share of that time spent waiting. Both are None after fewer than two steps.
        losses: of every step, all tasks together.
    """

    status: str
    steps_asked: int
    steps_done: int
    images_per_second: float | None
    waiting_for_data: float | None
    losses: tuple[float, ...]

    def __str__(self) -> str:
        """In a line, as the plot's legend has it."""
        words = []
        if self.images_per_second is not None:
            words.append(f"{self.images_per_second:.3g} images/s")
            if self.waiting_for_data > NOTICEABLE:
                words.append(f"{self.waiting_for_data:.0%} of the time waiting for data")
        if self.status != OK:
            why = textwrap.shorten(self.status, LONGEST_REASON, placeholder="…")
            words.append(f"{self.steps_done} of {self.steps_asked} steps: {why}")
        return ", ".join(words)


def write(out: Path, machine: Machine, what: str, curves: dict[str, Curve]) -> None:
    """Write the numbers, then the plot, each whole or not at all."""
    runs = {name: asdict(curve) for name, curve in curves.items()}
    record = {"machine": asdict(machine), "what": what, "runs": runs}
    with atomic_file(out / JSON_NAME) as file:
        file.write((json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    with atomic_file(out / PLOT_NAME) as file:
        draw(curves, what).savefig(file, format="png", dpi=150)


def curves_of(path: Path) -> tuple[Machine, str, dict[str, Curve]]:
    """Where and what was trained, and the curves, of a file that :func:`write` left.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is none of them.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return convert(record["machine"], Machine), record["what"], convert(record["runs"], dict[str, Curve])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not what bench.training writes: {error}") from None


def draw(curves: dict[str, Curve], title: str) -> Figure:
    """The loss curves on one plot, each as far as it goes."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss, all tasks together")
    for name, curve in curves.items():
        steps = range(1, curve.steps_done + 1)
        axes.plot(steps, curve.losses, label=f"{name}: {curve}", alpha=0.8, linewidth=1)
    axes.legend(fontsize=8)
    return figure
