"""Processes that have so many seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from bench.gpu.prepared import REPOSITORY

TO_END = 9  # seconds that a process may take from its interrupt; pytest waits for its workers
SECONDS_AFTER_KILL = 3
POLL_SECONDS = 0.05


def limited(
    command: Sequence[str],
    seconds: float,
    log: IO[bytes],
    environment: Mapping[str, str],
    stopped: Callable[[], bool],
) -> int:
    """Run a command; its exit code, 128 + n if signal n ended it.

    When its time is up, every process of the command is interrupted, as Ctrl-C does it, and shows what it
    has. Those that do not hear are killed, and not waited for if even that does not end them: a driver may
    hold them. ``timeout`` would interrupt twice, and the second interrupt ends the first's report.

    Its time is up after ``seconds``, or once ``stopped`` says so; ``log`` gets what it prints.
    """
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until and not stopped():
        time.sleep(POLL_SECONDS)
    if process.poll() is None:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TO_END)
    _signal(process, signal.SIGKILL)
    try:
        code = process.wait(SECONDS_AFTER_KILL)
    except subprocess.TimeoutExpired:
        code = -signal.SIGKILL
    return code if code >= 0 else 128 - code


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to all processes of a command that are left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
