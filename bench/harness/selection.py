"""What is to be measured, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bench.harness.case import SLOW_TO_START, Case
from bench.harness.results import OURS, Key

ALONE = "bwd"  # the backward pass alone is what fewest ask for
FIRST_DTYPE = "bf16"
DEFAULT_MODES = ("fwd", "fwdbwd")
DEFAULT_DTYPES = ("bf16", "fp32")
NONE = "none"  # in place of names of baselines: ours alone

Wanted = dict[str, list[str]]
"""Implementation → modes."""


@dataclass(frozen=True)
class Selection:
    """What is to be measured.

    Attributes:
        cases: in their order.
        modes: "fwd", "bwd", "fwdbwd"; a case without one of them leaves it out.
        dtypes: names; a case without one of them leaves it out.
        baselines: names of the baselines beside ours; None for all.
        seconds: for one measurement.
        quick: whether what takes minutes to start is left out.
        done: of rows that an earlier call left.
        repeatable: of ours among those. They are measured again beside every baseline that comes later: only
            times of one call are compared.
    """

    cases: tuple[Case, ...]
    modes: tuple[str, ...]
    dtypes: tuple[str, ...]
    baselines: tuple[str, ...] | None
    seconds: float
    quick: bool = False
    done: frozenset[Key] = frozenset()
    repeatable: frozenset[Key] = frozenset()

    def rounds(self) -> Iterator[tuple[Case, str, Wanted]]:
        """Every case in its dtypes, with what is left to measure of it, the most valuable first.

        First bf16 at NYUD-v2's maps, then its other shapes, then other dtypes. Baselines that take minutes
        to start follow in the same order, that of the whole model last; backward passes alone come last.
        """
        leading = _leading(self.cases)
        together = [mode for mode in self.modes if mode != ALONE]
        alone = [mode for mode in self.modes if mode == ALONE]
        every = itertools.product((together, alone), self.dtypes, self.cases, (False, True))
        repeated: set[Key] = set()

        def rank(each: tuple[list[str], str, Case, bool]) -> tuple[bool, ...]:
            modes, dtype, case, slow = each
            compiled_last, not_leading = slow and case.compiled_last, case not in leading
            return modes is alone, slow, compiled_last, dtype != FIRST_DTYPE, not_leading

        for modes, dtype, case, slow in sorted(every, key=rank):
            names = [name for name in self._implementations_of(case) if (name in SLOW_TO_START) == slow]
            wanted = {name: self._left(case, dtype, modes, name) for name in names}
            wanted = {name: left for name, left in wanted.items() if left}
            left = dict.fromkeys(itertools.chain(*wanted.values()))
            again = {key_of(case, dtype, mode, OURS): mode for mode in left}
            again = {key: mode for key, mode in again.items() if key in self.repeatable - repeated}
            repeated |= again.keys()
            if wanted:
                yield case, dtype, {OURS: [*again.values(), *wanted.pop(OURS, ())], **wanted}

    def headline(self) -> Selection:
        """What a report shows: NYUD-v2's maps in the first dtype, without what takes minutes to start."""
        names = tuple(
            name for case in self.cases for name in case.implementations if name not in SLOW_TO_START
        )
        return replace(self, cases=tuple(_leading(self.cases)), dtypes=(FIRST_DTYPE,), baselines=names)

    def keys(self) -> frozenset[Key]:
        """The keys of the rows that are left to measure."""
        return frozenset(
            key_of(case, dtype, mode, name)
            for case, dtype, wanted in self.rounds()
            for name, modes in wanted.items()
            for mode in modes
        )

    def __len__(self) -> int:
        return len(self.keys())

    def _implementations_of(self, case: Case) -> list[str]:
        return [
            name
            for name in case.implementations
            if name == OURS or self.baselines is None or name in self.baselines
        ]

    def _left(self, case: Case, dtype: str, modes: Sequence[str], name: str) -> list[str]:
        return [
            mode
            for mode in modes
            if mode in case.modes
            and dtype in case.dtypes
            and key_of(case, dtype, mode, name) not in self.done
        ]


def _leading(cases: Sequence[Case]) -> list[Case]:
    """The cases at NYUD-v2's maps; of an op that has none, those at its first shape."""
    leading = [case for case in cases if case.leading]
    firsts = {case.op: case.shape for case in reversed(cases)}
    known = {case.op for case in leading}
    return leading + [case for case in cases if case.op not in known and case.shape == firsts[case.op]]


def key_of(case: Case, dtype: str, mode: str, name: str) -> Key:
    """The key of a row: of an implementation of a case, in a dtype and mode."""
    return case.op, case.shape, dtype, case.modes[mode], name
