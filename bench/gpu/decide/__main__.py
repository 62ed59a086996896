"""Measure on one GPU what is to be decided, within seconds that are given; see ``bench.gpu.decide``.

Rows are written to OUT as they are found, and what the processes print to OUT.log. The exit code is 1 if a
row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import decide


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.decide", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(decide.SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=decide.BUDGET_SECONDS, help="of all together")
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes on a CPU: does every row run, and is it right?"
    )
    options = parser.parse_intermixed_args(arguments)
    if unknown := set(options.sections) - set(decide.SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    names = [name for name in decide.SECTIONS if name in options.sections or not options.sections]
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from bench.gpu.decide.driver import Driver, table  # after that

    if options.dry:
        rows = decide.dry(names)
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(table(rows))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are ended
        rows = Driver(options.out, names, options.seconds).run()
    failed = [row for row in rows if "failed" in row]
    print(f"\n{len(rows)} rows, {len(failed)} failed")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
