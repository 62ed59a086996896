"""The list of planted bugs is one of this code: ``python -m tests.mutations`` plants them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.mutations.mutation import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_bug_changes_text_that_is_there_once(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old
    assert mutation.tests
    assert all((ROOT / file).is_file() for file, *_ in mutation.tests)


def test_names_tell_bugs_apart() -> None:
    assert set(Counter(mutation.name for mutation in MUTATIONS).values()) == {1}
