"""``python -m bench``: an interrupt is one sentence, even while PyTorch is still being loaded."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from bench.program import main

        sys.exit(main())
    except KeyboardInterrupt:
        print("bench: interrupted while nothing was being measured", file=sys.stderr)
        sys.exit(130)
