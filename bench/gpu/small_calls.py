"""Every op forward and backward at the contract tests' sizes: what a sanitizer watches.

compute-sanitizer --tool memcheck python -m bench.gpu.small_calls

Samples are drawn on the CPU: the sanitizer sees their copies and the ops, no kernels that draw.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from bench.cases.op import op_run
from bench.harness.case import SEED
from bench.harness.command import USER_ERROR
from degmix_kernels import use_backend
from degmix_kernels.registry import OPS

DTYPE = torch.bfloat16


def main(arguments: Sequence[str] | None = None) -> int:
    """Call everything with Triton forced; 2 without a GPU."""
    parser = argparse.ArgumentParser("python -m bench.gpu.small_calls", description=__doc__.splitlines()[0])
    parser.add_argument("--first", action="store_true", help="only the first call of each op")
    first = parser.parse_args(arguments).first
    if not torch.cuda.is_available():
        print("small_calls: needs a GPU", file=sys.stderr)
        return USER_ERROR
    device, calls = torch.device("cuda"), 0
    with use_backend("triton"):
        for op in OPS:
            print(op.label, flush=True)  # a sanitizer that is cut off says how far it came
            samples = op.samples(device, DTYPE, torch.Generator().manual_seed(SEED))
            for sample in samples[:1] if first else samples:
                run = op_run(op, op.function, sample.arguments)
                (output,) = run.forward()
                gradient = torch.ones(output.shape, dtype=output.dtype).to(device)
                torch.autograd.grad(output, list(run.leaves.values()), gradient)
                torch.cuda.synchronize()
                calls += 1
    print(f"{calls} calls of {len(OPS)} ops, forward and backward")
    return 0


if __name__ == "__main__":
    sys.exit(main())
