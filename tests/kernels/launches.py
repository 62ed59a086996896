"""Watching, and leaving out, the launches of kernels in tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from degmix_kernels import launch
from degmix_kernels.launch import Launch


@contextmanager
def recorded_launches(execute: bool = True) -> Iterator[list[Launch]]:
    """Collect every launch made inside, in order; with ``execute=False`` none of them runs.

    Results are then whatever the memory held, which is enough to see what a call allocates.
    """
    seen, original = [], launch._launch

    def record(plan: Launch) -> None:
        seen.append(plan)
        if execute:
            original(plan)

    with patch.object(launch, "_launch", record):
        yield seen


def kernel_file(plan: Launch) -> str:
    """Name of the file a launch's kernel is written in, without its folder and ending."""
    return plan.kernel.fn.__module__.rpartition(".")[2]
