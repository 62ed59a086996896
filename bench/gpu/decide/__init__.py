"""Ways to compute the same, side by side: ours, PyTorch's and prototypes, to decide which one is built.

Every section is a module of this package with a function ``rows(meter)``; see :mod:`bench.gpu.decide.meter`.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

BUDGET_SECONDS = 160  # of all together
COMPILE_SECONDS = 50  # of these, at most, until every row has run once
SECTIONS = {  # in their order; seconds of each. What is left over goes to the next one
    "mix": 28,
    "general": 26,
    "tents": 10,
    "offsets": 12,
    "vsr": 14,
    "products": 8,
    "attention": 12,
}
PACKAGE = __name__


def dry(sections: Iterable[str] = SECTIONS) -> list[dict]:
    """Every row at tiny sizes, run once and compared but not timed: on the CPU by Triton's interpreter."""
    from bench.gpu.decide.meter import DRY, Meter
    from degmix_kernels import use_backend

    found = []

    def note(message: dict) -> None:
        if "row" in message:
            found.append({"section": name, **message["row"]})

    with use_backend("triton"):
        for name in sections:
            import_module(f"{PACKAGE}.{name}").rows(Meter(DRY, note))
    return found
