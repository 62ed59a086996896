"""Every case, in the order in which cases are measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from bench.cases import (
    attention,
    batch_norm,
    channel_mix,
    coordinate_bias,
    deform_conv,
    gating,
    linear_norm,
    model,
    task_attention,
)
from bench.cases.op import OpCases
from bench.cases.own import Own, OwnError
from bench.cases.recorded import Recorded
from bench.harness.case import Case
from bench.harness.measure import SECONDS
from bench.harness.results import Results
from bench.harness.selection import DEFAULT_DTYPES, DEFAULT_MODES, Selection
from degmix_kernels import registry

NOTHING = Own()

# What matters most comes first: a run may be stopped when its time is up.
_OWN: tuple[OpCases, ...] = (
    *deform_conv.OPS,
    *coordinate_bias.OPS,
    *task_attention.OPS,
    *channel_mix.OPS,
    *gating.OPS,
    *linear_norm.OPS,
    *batch_norm.OPS,
    *attention.OPS,
)
_WITHOUT = (op for op in registry.OPS if op not in [each.op for each in _OWN])
OPS: tuple[OpCases | Recorded, ...] = (*_OWN, *map(Recorded, _WITHOUT))


def cases(own: Own = NOTHING) -> tuple[Case, ...]:
    """All cases, with contenders and shapes of somebody's own.

    Raises:
        OwnError: if there is no such op, or a name is taken.
    """
    known = {name for each in OPS for name in (each.op.label, each.op.name)}
    for contender in own.contenders:
        if contender.op not in known:
            raise OwnError(f"contender {contender.name}: no op is called {contender.op}")
    found: list[Case] = list(model.CASES)
    for each in OPS:
        names = (each.op.label, each.op.name)
        beside = tuple(contender.baseline for contender in own.contenders if contender.op in names)
        found += each.cases(own.shapes, beside)
    taken = [("contender", name) for case in found for name in _twice(case.implementations)]
    taken += [("shape", key[1]) for key in _twice((case.op, case.shape, *case.modes) for case in found)]
    for what, name in taken:
        raise OwnError(f"{what} {name}: the name is taken")
    return tuple(found)


def _twice(names: Iterable[Any]) -> list[Any]:
    """What is there more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


CASES = cases()
FAMILIES = tuple(dict.fromkeys(case.family for case in CASES))


def everything() -> Selection:
    """What a run without options measures on a GPU."""
    real = tuple(case for case in CASES if not case.quick)
    return Selection(real, DEFAULT_MODES, DEFAULT_DTYPES, None, SECONDS)


def is_complete(results: Results) -> bool:
    """Whether all is in a file that a report shows, measured as often as it should be."""
    quick = any(part.quick for part in results.parts)
    return not quick and everything().headline().keys() <= results.keys
