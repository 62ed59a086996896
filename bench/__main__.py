"""``python -m bench``: an interrupt is one sentence, even while PyTorch is still being loaded."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    # A shell's background jobs ignore interrupts, which `timeout -s INT` has to reach nevertheless.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        from bench.program import main

        sys.exit(main())
    except KeyboardInterrupt:
        print("bench: interrupted while nothing was being measured", file=sys.stderr)
        sys.exit(130)
