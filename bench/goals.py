"""What the ops are meant to reach on an H200, beside what a result file says they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.cases import COMPILED, LOOP
from bench.model import FORMULA, HEAD
from bench.results import Results
from bench.shapes import LAUNCH, QUICK
from bench.speedups import SHOWN_DTYPE, SHOWN_MODES, Comparison, comparisons

TORCHVISION = "torchvision"
SDPA = "SDPA"
DEFORMOPS = "deformops"

SPEED, MEMORY, LIGHT = "times as fast as", "of the peak memory of", "of the speed of light"
MODES = (*SHOWN_MODES, "training step")


@dataclass(frozen=True)
class Goal:
    """A bound for every measured call of an op in bf16, forward and with its backward pass.

    Attributes:
        op: as of the rows.
        quantity: SPEED or LIGHT, which should be at least ``bound``, or MEMORY, at most.
        bound: a ratio.
        against: what the names of the baselines begin with; of LIGHT empty.
        launches: whether it is about small calls one after the other, and not about the large ones.
    """

    op: str
    quantity: str
    bound: float
    against: str = ""
    launches: bool = False

    def __str__(self) -> str:
        if self.quantity == SPEED:
            called = " one after the other, small" if self.launches else ""
            return f"at least {self.bound:g}× as fast as {self.against}{called}"
        if self.quantity == MEMORY:
            return f"at most {self.bound:.0%} {MEMORY} {self.against}"
        return f"at least {self.bound:.0%} {LIGHT}"

    def met(self, value: float) -> bool:
        """Whether a value of the quantity is on the right side of the bound."""
        return value <= self.bound if self.quantity == MEMORY else value >= self.bound

    def values(self, calls: Sequence[Comparison]) -> Iterator[tuple[float, str]]:
        """The quantity in every call that has it, and which call that is."""
        for call in calls:
            row = call.ours
            small = row.shape in (LAUNCH, QUICK)
            about = row.op == self.op and row.dtype == SHOWN_DTYPE and row.mode in MODES
            if not about or small != self.launches or (row.timer == LOOP) != self.launches:
                continue
            where = f"{row.shape}, {row.mode}"
            if self.quantity == LIGHT and row.speed_of_light is not None:
                yield row.speed_of_light, where
            for other in (
                each for each in call.others if self.against and each.impl.startswith(self.against)
            ):
                value = call.speed_up(other) if self.quantity == SPEED else call.share_of_peak(other)
                if value is not None:
                    yield value, f"{where}, {other.impl}"


def _matrix_goals(op: str) -> tuple[Goal, Goal]:
    return Goal(op, SPEED, 1.3, COMPILED), Goal(op, LIGHT, 0.7)


GOALS = (
    Goal("deform_conv2d (general)", SPEED, 3.0, TORCHVISION),
    Goal("deform_conv2d (general)", SPEED, 1.5, DEFORMOPS),
    Goal("deform_conv2d (general)", MEMORY, 0.25, TORCHVISION),
    Goal("deform_conv2d (general)", SPEED, 1.0, TORCHVISION, launches=True),
    *(
        goal
        for op in ("deform_conv2d (per channel)", "deform_mix")
        for goal in (Goal(op, SPEED, 8.0, TORCHVISION), Goal(op, LIGHT, 0.6))
    ),
    *(goal for op in ("channel_mix", "spatial_gating_unit", "gated_mlp") for goal in _matrix_goals(op)),
    Goal("task_attention", SPEED, 5.0, SDPA),
    Goal("task_attention", LIGHT, 0.8),
    Goal("gated_attention", SPEED, 1.0, SDPA),
    Goal(HEAD, SPEED, 3.0, FORMULA),
    Goal(HEAD, SPEED, 1.5, COMPILED),
    Goal(HEAD, MEMORY, 0.35, FORMULA),
)


def table(results: Results | None) -> list[str]:
    """Every goal in Markdown: in how many of its calls it is met, and which call is furthest from it."""
    calls = [] if results is None else comparisons(results.rows)
    return [
        "| op | goal | met in | furthest from it |",
        "|---|---|---|---|",
        *(f"| `{goal.op}` | {goal} | {_found(goal, list(goal.values(calls)))} |" for goal in GOALS),
    ]


def _found(goal: Goal, values: list[tuple[float, str]]) -> str:
    if not values:
        return "not measured | "
    worst, where = (max if goal.quantity == MEMORY else min)(values)
    shown = f"{worst:.2f}×" if goal.quantity == SPEED else f"{worst:.0%}"
    return f"{sum(goal.met(value) for value, _ in values)} of {len(values)} | {shown}: {where}"
