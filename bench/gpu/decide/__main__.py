"""Measure the prototypes by ``python -m bench``, going on where the file ends."""

import argparse
import runpy
import sys
from pathlib import Path

from bench.gpu import decide

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.decide",
        description=__doc__,
        epilog="Other options are those of python -m bench; --shapes quick is everything at a tiny size. "
        "Without a GPU, prototypes need TRITON_INTERPRET=1.",
    )
    parser.add_argument("file", type=Path, metavar="OUT.jsonl", help="result file, continued if it is there")
    chosen, options = parser.parse_known_args()
    names = ["torchvision fp16", "torchvision fp32", *(each.name for each in decide.CONTENDERS)]
    sys.argv[1:] = ["--with", decide.__file__, "--mode", "fwd", "bwd", "--dtype", "bf16"]
    sys.argv += ["--baseline", *names, "--resume", str(chosen.file), *options]
    runpy.run_module("bench", run_name="__main__", alter_sys=True)
