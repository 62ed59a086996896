"""Takes the rows of a section: runs them, compares their results, times them."""

from __future__ import annotations

import math
import os
import statistics
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.harness.case import CLOCK, EVENTS
from bench.harness.measure import WARM_UP, Call, host_seconds, measure
from degmix_kernels.backend import INTERPRETED
from degmix_kernels.testing import relative_l2, tolerance

DRY, WARM, TIME = "dry", "warm", "time"
Results = Tensor | Sequence[Tensor | None] | None
Count = int | Callable[[], int]


class Meter:
    """Takes the rows of a section, in one of three ways.

    ``DRY``: every row once, at tiny sizes, and compared. ``WARM``: every row of real sizes once, which
    compiles. ``TIME``: run, compared and timed.

    Args:
        mode: one of these.
        tell: takes ``{"at": (name, variant)}`` before a row and ``{"row": {...}}`` after it.
        done: (name, variant) of rows to be left out.
        seconds: to spend on a measurement, about.
    """

    def __init__(
        self,
        mode: str,
        tell: Callable[[dict[str, Any]], object],
        done: Collection[tuple[str, str]] = (),
        seconds: float = 0.0,
    ) -> None:
        self.mode, self._tell, self._done, self._seconds = mode, tell, done, seconds
        gpu = torch.cuda.is_available() and not INTERPRETED
        self.device = torch.device("cuda" if gpu else "cpu")
        torch.manual_seed(0)

    @property
    def dry(self) -> bool:
        """Whether sizes are to be tiny."""
        return self.mode == DRY

    def row(
        self,
        name: str,
        variant: str,
        step: Callable[[], Results],
        *,
        expected: Callable[[], Results] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        reduction: int = 1,
        bytes: Count = 0,
        flops: Count = 0,
        operations: Count = 0,
        timer: str = EVENTS,
        note: str = "",
    ) -> None:
        """One way to compute something.

        Args:
            name: what is computed. The first row of a name that is called "present…" is what the others are
                compared with.
            variant: how.
            step: computes it.
            expected: what ``step`` has to return, or the beginning of it along every axis; None where a
                result is not compared. A row whose error is above the tolerance fails and is not timed.
            dtype: of the tolerance, with ``reduction``: see :func:`degmix_kernels.testing.tolerance`.
            reduction: terms of the longest sum.
            bytes: moved by ``step``, from which a rate is made; a number, or a function that counts them.
            flops: of ``step``, in the same way.
            operations: of any other kind, in the same way.
            timer: as of :func:`bench.harness.measure.measure`.
            note: anything else.
        """
        if (name, variant) in self._done:
            return
        self._tell({"at": (name, variant)})
        row: dict[str, Any] = {"name": name, "variant": variant, "note": note}
        try:
            results = step()
            self._synchronize()
            if expected is not None and self.mode != WARM:
                row["error"] = largest_error(results, expected())
                if not row["error"] <= (limit := tolerance(dtype, reduction)):  # written so that NaN fails
                    raise ArithmeticError(f"relative L2 error {row['error']:.1e}, tolerance {limit:.1e}")
            del results
            if self.mode == TIME:
                row |= self._timed(step, timer)
                amounts = {"GB/s": (bytes, 1e9), "TFLOP/s": (flops, 1e12), "G/s": (operations, 1e9)}
                for unit, (count, size) in amounts.items():
                    if count:
                        count = count() if callable(count) else count
                        row |= {"rate": count / size / (row["ms"] / 1e3), "unit": unit}
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            traceback.print_exc()
        self._tell({"at": None} if self.mode == WARM else {"row": row})
        if "failed" in row and self._lost():
            os._exit(1)

    def _timed(self, step: Callable[[], Results], timer: str) -> dict[str, float]:
        call = Call(lambda: None, lambda _: step())
        timing = measure(call, timer if self.device.type == "cuda" else CLOCK, self._seconds)
        times = {"ms": timing.ms, "p20": timing.ms_p20, "p80": timing.ms_p80}
        if self.device.type == "cuda":
            times["host"] = 1e3 * statistics.median(host_seconds(call) for _ in range(WARM_UP))
        return times

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _lost(self) -> bool:
        """Whether an error has ended all work of this process on the GPU."""
        try:
            self._synchronize()
        except Exception:
            return True
        return False


def largest_error(results: Results, expected: Results) -> float:
    """The largest relative L2 error of those that are expected; NaN if there is a NaN."""
    results, expected = ((each,) if isinstance(each, Tensor) else each for each in (results, expected))
    errors = [
        relative_l2(result[tuple(map(slice, wanted.shape))], wanted)
        for result, wanted in zip(results, expected, strict=True)
        if wanted is not None
    ]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)
