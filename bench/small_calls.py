"""Every op once, forward and backward, at the contract tests' sizes: what a sanitizer watches.

compute-sanitizer --tool memcheck python -m bench.small_calls
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.cases import SEED
from degmix_kernels import use_backend
from degmix_kernels.registry import OPS


def main(arguments: Sequence[str] | None = None) -> int:
    """Call everything with Triton forced; 2 without a GPU."""
    parser = argparse.ArgumentParser("python -m bench.small_calls", description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("small_calls: needs a GPU", file=sys.stderr)
        return 2
    device, calls = torch.device("cuda"), 0
    with use_backend("triton"):
        for op in OPS:
            print(op.label, flush=True)  # a sanitizer that is cut off says how far it came
            for sample in op.samples(device, torch.bfloat16, torch.Generator().manual_seed(SEED)):
                arguments = dict(sample.arguments)
                leaves = [name for name in op.differentiable if isinstance(arguments.get(name), Tensor)]
                for name in leaves:
                    arguments[name] = arguments[name].detach().requires_grad_()
                output = op.function(**arguments)
                torch.autograd.grad(output, [arguments[name] for name in leaves], torch.ones_like(output))
                torch.cuda.synchronize()
                calls += 1
    print(f"{calls} calls of {len(OPS)} ops, forward and backward")
    return 0


if __name__ == "__main__":
    sys.exit(main())
