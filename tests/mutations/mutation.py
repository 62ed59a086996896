"""What a planted bug is, and how the lists of bugs are read.

A list is a text. The bugs of a file stand below the file's name. A bug has a name and marked lines. ``-`` is
the right text, which occurs exactly once in the file. ``+`` is the wrong text that replaces it, if any does.
``?`` is a file of tests, or the tests in it whose names have the words after the colon: each has to fail.

Who rewrites a line that a bug changes gives the bug its new text: the same mistake in the new code. Who moves
a test gives the bug its new selection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from tests.mutations import host, kernels


class Mutation(NamedTuple):
    """A name, a file from the repository's root, both texts, and arguments of pytest for each run."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[tuple[str, ...], ...]


def read(text: str) -> Iterator[Mutation]:
    """The bugs of a list."""
    for of_file in re.split(r"\n+(?=\S)", text.strip()):
        file, *bugs = re.split(r"\n  (?=\S)", of_file)
        for bug in bugs:
            name, *lines = bug.splitlines()
            old, new, tests = ([line[6:] for line in lines if line[4] == mark] for mark in "-+?")
            yield Mutation(name, file, "\n".join(old), "\n".join(new), tuple(map(selection, tests)))


def selection(text: str) -> tuple[str, ...]:
    """Arguments of pytest."""
    file, _, words = text.partition(": ")
    return (f"tests/{file}.py", *(("-k", words) if words else ()))


MUTATIONS = (*read(kernels.BUGS), *read(host.BUGS))
