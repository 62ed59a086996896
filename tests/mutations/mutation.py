"""What a bug of the list is, and how it names the tests that have to notice it.

A bug is one change of text. Who rewrites a line that a bug changes gives the bug its new text: the same
mistake in the new code. Who moves a test gives the bug its new selection.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One bug.

    Attributes:
        name: what is wrong, in a few words.
        file: where, from the root of the repository.
        old: the right text. It occurs exactly once in the file.
        new: the wrong text that replaces it.
        tests: selections of tests, as arguments of pytest. Each of them has to fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[tuple[str, ...], ...]


def select(file: str, wanted: str = "") -> tuple[str, ...]:
    """A file of tests, or those of its tests whose names have the wanted words."""
    return (f"tests/{file}.py", *(("-k", wanted) if wanted else ()))


# Values and gradients of the contract tests, in fp32, by op.
FP32 = "values_and_gradients and float32 and "
