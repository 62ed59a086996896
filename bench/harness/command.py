"""What the commands of this folder share: exit codes, and where they print."""

from __future__ import annotations

import sys

from rich.console import Console

FAILURE = 1
USER_ERROR = 2
LOST = 3  # the GPU answers no more
INTERRUPTED = 130
LOG_WIDTH = 110  # columns, where there is no terminal that has its own


def console() -> Console:
    """What a command prints to."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)
