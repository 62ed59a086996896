"""The process of one section: ``python -m bench.gpu.decide.section MODULE``, started by ``driver``.

Says on standard output, in lines of JSON, at which row it is, the rows, and that it is ready to be timed.
Whatever else is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module

out = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def tell(message: dict) -> None:
    """One line for the driver."""
    out.write(json.dumps(message) + "\n")


def main(module: str) -> None:
    """Run every row once, if asked to, and time every row once told to go."""
    import torch  # after standard output is safe

    from bench.gpu.decide.meter import TIME, WARM, Meter

    order = json.loads(sys.stdin.readline())
    rows = import_module(module).rows
    done = {tuple(key) for key in order["done"]}
    if order["warm"]:
        rows(Meter(WARM, tell, done))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # others run before this one goes on
    tell({"ready": True})
    if sys.stdin.readline() == "go\n":
        rows(Meter(TIME, tell, done, order["seconds"]))


if __name__ == "__main__":
    main(sys.argv[1])
