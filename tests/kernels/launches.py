"""Watching, and leaving out, the launches of kernels in tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import Tensor

from degmix_kernels import launch
from degmix_kernels.launch import Launch
from degmix_kernels.tracers import transparent


def kernel_names(launches: list[Launch]) -> list[str]:
    """The kernels of launches, in order."""
    return [launch.kernel.fn.__name__ for launch in launches]


@contextmanager
def recorded_launches(execute: bool = True) -> Iterator[list[Launch]]:
    """Collect every launch made inside, in order.

    In its arguments a tensor's dtype takes the tensor's place, so that no tensor lives longer than ever.
    With ``execute=False`` none of them runs. Results are then whatever the memory held, which is enough to
    see what a call allocates.
    """
    seen, original = [], launch._launch

    def record(plan: Launch) -> None:
        arguments = {
            name: value.dtype if isinstance(value, Tensor) else value
            for name, value in plan.arguments.items()
        }
        seen.append(plan._replace(arguments=arguments))
        if execute:
            original(plan)

    # Dispatch modes around it see inside the ops, too: launches need them to run, if on fake tensors.
    with transparent(True), patch.object(launch, "_launch", record):
        yield seen
