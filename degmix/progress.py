"""Progress of long work: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[[int, str], None]
"""Called with how much is done by now and a line about the work."""

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def stage(console: Console, title: str, total: int, start: int = 0) -> Iterator[Advance]:
    """Show one stage of the work.

    Args:
        console: where to show it.
        title: what is going on.
        total: the count at the end.
        start: the count already done, by a run that this one resumes.
    """
    if console.is_terminal:
        with _Bar(console) as bar:
            task = bar.add_task(title, total=total, completed=start)

            def advance(done: int, detail: str) -> None:
                bar.detail = detail
                bar.update(task, completed=done)

            yield advance
    else:
        yield _lines(console, title, total, start)


class _Bar(Progress):
    """A progress bar with a line of details below it."""

    def __init__(self, console: Console) -> None:
        self.detail = ""
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.detail:
            yield Text(self.detail, style="dim")


def _lines(console: Console, title: str, total: int, start: int) -> Advance:
    """An ``advance`` that prints a line from time to time, and always the last one."""
    began = last = time.monotonic()

    def advance(done: int, detail: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        remaining = (now - began) / max(done - start, 1) * (total - done)
        timing = f"ETA {_clock(remaining)}" if done < total else f"took {_clock(now - began)}"
        # soft_wrap: a log keeps one line per line.
        console.print(f"{title} {done}/{total}  {timing}  {detail}".rstrip(), soft_wrap=True, highlight=False)

    return advance


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
