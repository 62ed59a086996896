"""Run a command for so many seconds: then it is interrupted, as Ctrl-C does it, and then killed.

python -m bench.limited SECONDS SECONDS_TO_END COMMAND...

As ``timeout`` does, but every process of the command gets one interrupt, where ``timeout`` sends two, the
second of which ends the report of the first; none outlives the command; and none is waited for that not even
killing ends, as a driver may hold it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

SECONDS_AFTER_KILL = 3


def run(seconds: float, seconds_to_end: float, command: Sequence[str]) -> int:
    """The command's exit code; 128 + n if signal n ended it. An interrupt of this process is handed on."""
    # Background jobs ignore interrupts, and so would what they start; what has a handler is reset by exec.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(command, start_new_session=True)
    try:
        child.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        _signal(child, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(seconds_to_end)
    _signal(child, signal.SIGKILL)
    try:
        code = child.wait(SECONDS_AFTER_KILL)
    except subprocess.TimeoutExpired:
        code = -signal.SIGKILL
    return code if code >= 0 else 128 - code


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to all processes of the child that are left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


if __name__ == "__main__":
    sys.exit(run(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
