"""Compile every planned launch of the registry for one target, without a GPU; print one JSON line for each.

Run as ``python compile_kernels.py cuda 90`` in a process of its own, without TRITON_INTERPRET: whether a
kernel is compiled or interpreted is settled when it is defined. test_compile.py judges the lines.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from degmix_kernels.launch import INT32_MAX, Launch
from degmix_kernels.registry import OPS

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def source(launch: Launch) -> ASTSource:
    """The specialisation that Triton's launcher would make of these arguments."""
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, dict(launch.constants), {}
    for name in names:
        value = launch.arguments.get(name)
        position = (names.index(name),)
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[position] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value <= INT32_MAX else "i64"
            if value % 16 == 0:
                attributes[position] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def resources(compiled: triton.compiler.CompiledKernel, target: GPUTarget) -> dict[str, Any]:
    """Registers per thread, bytes or registers spilled, shared memory, products on matrix units, widths."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        counts = {key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "agpr_count")}
        # Scalar registers spill into lanes of vector registers; only these spill to memory.
        spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1]
        stack = re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1]
        registers, spilled = counts["vgpr_count"], int(spills) + int(stack)
        matrix = older = "v_mfma" in text
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", file.name]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
        registers, spilled = int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
        # Hopper's and Blackwell's own instructions, not the mma.sync of the generations before.
        own = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(target.arch, "mma.sync")
        matrix, older = (name in compiled.asm["ptx"] for name in (own, "mma.sync"))
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
        "products": "tt.dot" in compiled.asm["ttir"],
        "matrix": matrix,
        "older_matrix": older,
        **({} if target.backend == "hip" else widths(compiled.asm["ptx"])),
    }


def widths(ptx: str) -> dict[str, dict[int, int]]:
    """Bits per thread → number of instructions, for loads from and reductions into global memory."""
    counts = {}
    for name, instruction in {"loads": r"ld\.global", "reductions": r"(?:red|atom)\.global"}.items():
        found = re.findall(rf"\b{instruction}[.\w:]*?(?:\.v(\d))?\.(?:noftz\.)?[bfsu](\d+)\b", ptx)
        counts[name] = dict(Counter(int(count or 1) * int(bits) for count, bits in found))
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)", ptx)
    counts["loads"] = dict(Counter(counts["loads"]) + Counter(8 * int(size, 0) for size in copies))
    return counts


def main(backend: str, arch: str) -> None:
    """Compile for ``cuda 80|90|100`` or ``hip gfx942``."""
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    done = set()
    for op in OPS:
        if op.kernels is None:
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for launch in op.kernels(dtype):
                specialised = source(launch)
                key = (specialised.hash(), launch.num_warps, launch.num_stages)
                if key in done:  # ops may share kernels
                    continue
                done.add(key)
                options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
                compiled = triton.compile(specialised, target=target, options=options)
                line = {
                    "op": op.label,
                    "kernel": launch.kernel.__name__,
                    "dtype": str(dtype).removeprefix("torch."),
                    "constants": dict(launch.constants),
                    "sizes": {name: n for name, n in launch.arguments.items() if isinstance(n, int)},
                    "num_warps": launch.num_warps,
                    **resources(compiled, target),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
