"""What the ops are meant to reach on a Hopper GPU, beside what a result file says they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.cases.model import FORMULA, HEAD
from bench.cases.shapes import LAUNCH, QUICK
from bench.harness.case import COMPILED, DEFORMOPS, LOOP
from bench.harness.results import Results
from bench.report.speedups import SHOWN_DTYPE, SHOWN_MODES, Comparison, comparisons

TORCHVISION = "torchvision"
SDPA = "SDPA"

SPEED, MEMORY, LIGHT = "times as fast as", "of the peak memory of", "of the speed of light"
MODES = (*SHOWN_MODES, "training step", "inference")


@dataclass(frozen=True)
class Goal:
    """A bound for every measured call of an op.

    Attributes:
        op: as of the rows.
        quantity: SPEED or LIGHT, which should be at least ``bound``, or MEMORY, at most.
        bound: a ratio.
        against: what the names of the baselines begin with; of LIGHT empty.
        modes: of the rows that it is about.
        dtype: of the rows that it is about.
        launches: whether it is about small calls one after the other, and not about the large ones.
    """

    op: str
    quantity: str
    bound: float
    against: str = ""
    modes: tuple[str, ...] = MODES
    dtype: str = SHOWN_DTYPE
    launches: bool = False

    def __str__(self) -> str:
        about = ", one after the other, small" if self.launches else ""
        about += "" if self.modes == MODES else f", {' and '.join(self.modes)}"
        about += "" if self.dtype == SHOWN_DTYPE else f", {self.dtype}"
        if self.quantity == SPEED:
            return f"at least {self.bound:g}× as fast as {self.against}{about}"
        if self.quantity == MEMORY:
            return f"at most {self.bound:.0%} {MEMORY} {self.against}{about}"
        return f"at least {self.bound:.0%} {LIGHT}{about}"

    def met(self, value: float) -> bool:
        """Whether a value of the quantity is on the right side of the bound."""
        return value <= self.bound if self.quantity == MEMORY else value >= self.bound

    def values(self, calls: Sequence[Comparison]) -> Iterator[tuple[float, str]]:
        """The quantity in every call that has it, and which call that is."""
        for call in calls:
            row = call.ours
            small = row.shape in (LAUNCH, QUICK)
            about = row.op == self.op and row.dtype == self.dtype and row.mode in self.modes
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


FORWARD, WITH_BACKWARD = SHOWN_MODES
INFERENCE, STEP = "inference", "training step"

GOALS = (
    Goal("deform_conv2d (general)", SPEED, 3.0, TORCHVISION),
    Goal("deform_conv2d (general)", SPEED, 1.5, DEFORMOPS),
    Goal("deform_conv2d (general)", MEMORY, 0.25, TORCHVISION),
    Goal("deform_conv2d (general)", SPEED, 1.0, TORCHVISION, launches=True),
    Goal("deform_conv2d (general)", SPEED, 1.3, f"{TORCHVISION} fp32", dtype="fp32"),
    Goal("deform_conv2d (small groups)", SPEED, 3.0, TORCHVISION, modes=(FORWARD,)),
    Goal("deform_conv2d (small groups)", SPEED, 4.0, TORCHVISION, modes=(WITH_BACKWARD,)),
    *(
        goal
        for op in ("deform_conv2d (per channel)", "deform_mix")
        for goal in (
            Goal(op, SPEED, 5.0, TORCHVISION),
            Goal(op, LIGHT, 0.6, modes=(FORWARD,)),
            Goal(op, LIGHT, 0.5, modes=(WITH_BACKWARD,)),
        )
    ),
    *(Goal(op, SPEED, 1.2, COMPILED) for op in ("channel_mix", "spatial_gating_unit", "gated_mlp")),
    Goal("channel_mix", LIGHT, 0.45),
    Goal("task_attention", SPEED, 5.0, SDPA),
    Goal("task_attention", LIGHT, 0.8),
    Goal("gated_attention", SPEED, 1.0, SDPA),
    Goal(HEAD, SPEED, 3.0, FORMULA, modes=(STEP,)),
    Goal(HEAD, SPEED, 2.0, COMPILED, modes=(STEP,)),
    Goal(HEAD, MEMORY, 0.35, FORMULA, modes=(STEP,)),
    Goal(HEAD, SPEED, 3.0, FORMULA, modes=(INFERENCE,)),
    Goal(HEAD, SPEED, 1.5, COMPILED, modes=(INFERENCE,)),
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
