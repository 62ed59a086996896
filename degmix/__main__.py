"""``degmix`` and ``python -m degmix``."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

EXTRA = {"PIL", "click", "rich", "safetensors", "scipy", "timm", "typer", "yaml"}


def main() -> NoReturn:
    """Run the command line, or say what has to be installed for it."""
    # OpenMP reads this when PyTorch is loaded. Threads that spin while they wait make a training step on a
    # CPU many times slower as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from degmix.cli import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        print(
            f"degmix: no package {error.name}; install it with: pip install 'degmix[train]'", file=sys.stderr
        )
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
