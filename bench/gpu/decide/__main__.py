"""``python -m bench.gpu.decide OUT.jsonl``: the prototypes by ``python -m bench``, going on where OUT ends.

Further options are those of ``python -m bench``: with ``--shapes quick`` everything runs at a tiny size.
"""

import runpy
import sys

from bench.gpu import decide

if __name__ == "__main__":
    names = ["torchvision fp16", "torchvision fp32", *(each.name for each in decide.CONTENDERS)]
    options = ["--with", decide.__file__, "--mode", "fwd", "bwd", "--dtype", "bf16", "--baseline", *names]
    sys.argv[1:] = [*options, "--resume", *sys.argv[1:]]
    runpy.run_module("bench", run_name="__main__", alter_sys=True)
