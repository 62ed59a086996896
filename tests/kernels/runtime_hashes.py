"""Print two hashes of launches that cover bench.gpu.front_end's: trace.specialise's, and the runtime's.

To be run without TRITON_INTERPRET. A stub stands for the driver of an H100. The runtime's own hook reports
what would be compiled, and prevents it.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.gpu.front_end import Candidate, covering, distinct, launches
from degmix_kernels.launch import Launch

DRIVER = SimpleNamespace(  # what the runtime asks a driver for before it compiles
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
)


def of_runtime(launch: Launch) -> str:
    """The hash of the source that the runtime would compile for these arguments."""
    hashes: list[str] = []

    def report(*, fn, compile, **_) -> bool:
        constants, attributes = compile["constants"], compile["configs"][0]
        hashes.append(ASTSource(fn.jit_function, compile["signature"], constants, attributes).hash())
        return True  # as if it were compiled already

    triton.knobs.runtime.jit_cache_hook = report
    launch.kernel.run(
        grid=(launch.programs,),
        warmup=True,
        **launch.arguments,
        **launch.constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    (found,) = hashes
    return found


if __name__ == "__main__":
    triton.runtime.driver.set_active(DRIVER)
    for candidate in covering(distinct(Candidate(op, launch) for op, launch in launches())):
        ours = candidate.specialised
        row = {"module": ours.module, "kernel": ours.kernel, "ours": ours.source.hash()}
        print(json.dumps(row | {"runtime": of_runtime(candidate.launch)}))
