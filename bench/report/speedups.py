"""Our rows of a result file beside the baselines' of the same calls, and which of them a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.cases.shapes import is_leading
from bench.harness.results import OURS, Results, Row

SHOWN_DTYPE = "bf16"  # of an op that was measured in several
SHOWN_MODES = ("fwd", "fwdbwd")


@dataclass(frozen=True)
class Comparison:
    """Our rows of one case, and the baselines' rows of the same case and timer.

    Attributes:
        measured: ours, the first time and whenever a baseline was measured in a later call.
        others: the baselines'.
    """

    measured: tuple[Row, ...]
    others: tuple[Row, ...]

    @property
    def ours(self) -> Row:
        """Ours as measured first."""
        return self.measured[0]

    def speed_up(self, other: Row) -> float | None:
        """How many times as fast as another implementation ours was in the same call; None without times."""
        ours = next((row for row in self.measured if row.part == other.part), None)
        return other.ms / ours.ms if ours is not None and other.ms and ours.ms else None

    def share_of_peak(self, other: Row) -> float | None:
        """Our peak memory over another implementation's; None without both."""
        return self.ours.peak_bytes / other.peak_bytes if self.ours.peak_bytes and other.peak_bytes else None


def shown(results: Results) -> list[Comparison]:
    """Each op's calls at NYUD-v2's maps, or at its first shape; all others are in the file alone."""
    calls = [
        call
        for call in comparisons(results.rows)
        if call.ours.images is None and call.ours.mode in SHOWN_MODES
    ]
    chosen = []
    for op in dict.fromkeys(call.ours.op for call in calls):
        of_op = [call for call in calls if call.ours.op == op]
        candidates = [call for call in of_op if call.ours.dtype == SHOWN_DTYPE] or of_op
        first = next((call for call in candidates if is_leading(call.ours.shape)), candidates[0]).ours
        place = (first.shape, first.dtype)
        there = [call for call in candidates if (call.ours.shape, call.ours.dtype) == place]
        # Launches of small calls are timed twice, in two ways; a call that failed has no timer.
        timer = next((call.ours.timer for call in there if call.ours.timer is not None), None)
        chosen += [call for call in there if call.ours.timer in (timer, None)]
    return chosen


def model_calls(results: Results) -> list[Comparison]:
    """The calls of the model."""
    return [call for call in comparisons(results.rows) if call.ours.images is not None]


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Every case and timer of ours, with the baselines."""
    ours: dict[tuple[str | None, ...], list[Row]] = {}
    for row in rows:
        if row.impl == OURS:
            ours.setdefault((*row.case, row.timer), []).append(row)
    others = [row for row in rows if row.impl != OURS]
    return [
        Comparison(tuple(measured), tuple(row for row in others if _comparable(row, measured[0])))
        for measured in ours.values()
    ]


def _comparable(row: Row, ours: Row) -> bool:
    # A row without times stands among whatever was timed.
    return row.case == ours.case and (row.timer == ours.timer or None in (row.timer, ours.timer))
