"""Compile launches of the registry's calls for one target, without a GPU; print one JSON line for each.

``bench.resources`` runs this in a process of its own, without TRITON_INTERPRET: whether a kernel is compiled
or interpreted is settled when it is defined. The first line has the keys of all launches, and how many are
compiled: a line for each of them follows.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from bench.cases import model
from bench.cases.registry import CASES
from bench.cases.shapes import QUICK
from bench.compiler.compiled import Compiled, Planned
from bench.compiler.targets import TARGETS, Target
from bench.compiler.trace import NAMES, Specialised, both_passes, launches_of, specialise, traced
from bench.harness.case import DTYPES, Case
from bench.harness.results import OURS
from degmix_kernels.launch import Launch
from degmix_kernels.registry import OPS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

TURNS = ("fp32", "bf16", "fp16")  # a target checks one dtype of every kernel, so that all together check each

Labelled = tuple[str, str, Launch]
"""Label of an op, dtype, launch."""


def planned(op_part: str, dtypes: Sequence[str]) -> Iterator[Labelled]:
    """Every launch of the calls that the registry wants compiled."""
    for op in OPS:
        if op_part in op.label:
            for dtype in dtypes:
                yield from ((op.label, dtype, launch) for launch in launches_of(op, DTYPES[dtype]))


def benchmarked(op_part: str, dtypes: Sequence[str]) -> Iterator[Labelled]:
    """Every launch of the calls of ops that the benchmark measures on a GPU, made without memory and data."""
    for case in CASES:
        if case.family == model.FAMILY or case.shape.startswith(QUICK) or op_part not in case.op:
            continue
        for dtype in dtypes:
            yield from ((case.op, dtype, launch) for launch in _launches(case, DTYPES[dtype]))


def _launches(case: Case, dtype: torch.dtype) -> list[Launch]:
    """What a call, in inference and in training, and its backward pass would launch."""
    seen: list[Launch] = []
    with FakeTensorMode(), traced(seen.append):
        run = case.prepare(torch.device("cpu"), dtype).runs[OURS]()
        both_passes(run.forward, {}, list(run.leaves.values()))
    return seen


def specialised(launches: Iterable[Labelled]) -> Iterator[tuple[str, str, Launch, Specialised]]:
    """The same with the specialisation of each; of equal ones, the first."""
    done = set()
    for label, dtype, launch in launches:
        specialisation = specialise(launch)
        if specialisation.key not in done:
            done.add(specialisation.key)
            yield label, dtype, launch, specialisation


def measure(compiled: CompiledKernel, target: Target) -> dict[str, Any]:
    """The fields of :class:`bench.compiler.compiled.Compiled` that the compiler settles."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        counts = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1])
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        }
        registers = counts["vgpr_count"]  # of both kinds, general and those of matrix products
        # Scalar registers spill into lanes of vector registers; only these spill to memory.
        spilled = counts["vgpr_spill_count"] + counts["private_segment_fixed_size"]
        loads, reductions = amd_widths(text)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        registers, spilled = counts["REG"], counts["STACK"] + counts["LOCAL"]
        text = compiled.asm["ptx"]
        loads, reductions = nvidia_widths(text)
    own_first = (target.matrix, target.older_matrix)
    return {
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0),  # AMD's records have no such field
        "products": "tt.dot" in compiled.asm["ttir"],
        "matrix": next((name for name in own_first if name and name in text), None),
        "loads": loads,
        "reductions": reductions,
    }


def nvidia_widths(ptx: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bits per lane → number of instructions, for loads from and reductions into global memory."""
    counts = []
    for instruction in (r"ld\.global", r"(?:red|atom)\.global"):
        found = re.findall(rf"\b{instruction}[.\w:]*?(?:\.v(\d))?\.(?:noftz\.)?[bfsu](\d+)\b", ptx)
        counts.append(Counter(int(count or 1) * int(bits) for count, bits in found))
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)", ptx)
    counts[0].update(8 * int(size, 0) for size in copies)
    return _sorted(counts[0]), _sorted(counts[1])


def amd_widths(assembly: str) -> tuple[dict[str, int], dict[str, int]]:
    """The same of AMD's assembly."""
    space = r"\b(?:global|buffer|flat)_"
    loads = Counter()
    for kind, count in re.findall(rf"{space}load_([us]byte|[us]?short|dword)(?:_d16\w*|x(\d))?\b", assembly):
        loads[(8 if "byte" in kind else 16 if "short" in kind else 32) * int(count or 1)] += 1
    added = re.findall(rf"{space}atomic_(?:pk_)?add(?:_(?:f|bf)(\d+))?(_x2)?\b", assembly)
    reductions = Counter(64 if twice or bits == "64" else 32 for bits, twice in added)
    return _sorted(loads), _sorted(reductions)


def _sorted(counts: Counter[int]) -> dict[str, int]:
    return {str(bits): count for bits, count in sorted(counts.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("target", choices=TARGETS)
    add("--op", default="", help="only ops whose label contains this")
    add("--dtype", choices=DTYPES, help="only this one")
    add("--benchmark", action="store_true", help="those of the benchmark's calls instead")
    add("--representatives", action="store_true", help="one of each kernel, in the target's dtype")
    arguments = parser.parse_args()
    target = TARGETS[arguments.target]
    gpu = GPUTarget(target.backend, target.arch, target.lanes)
    if target.backend == "hip" and torch.version.hip is None:
        torch.version.hip = "none, but compiled for"  # plans ask it for whom they plan
    which = benchmarked if arguments.benchmark else planned
    # A launch that several dtypes share goes by the first.
    dtypes = [arguments.dtype] if arguments.dtype else TURNS
    launches = [
        (plan(op, dtype, launch, target.name, specialisation.capped(gpu)), specialisation)
        for op, dtype, launch, specialisation in specialised(which(arguments.op, dtypes))
    ]
    turn = dtypes[list(TARGETS).index(target.name) % len(dtypes)]
    chosen = representatives(launches, turn) if arguments.representatives else launches
    print(json.dumps({"keys": [planned.key for planned, _ in launches], "compiled": len(chosen)}), flush=True)
    for planned_launch, specialisation in chosen:
        compiled = triton.compile(specialisation.source, target=gpu, options=specialisation.options(gpu))
        row = Compiled(**asdict(planned_launch), **measure(compiled, target))
        print(json.dumps(asdict(row)), flush=True)


def plan(op: str, dtype: str, launch: Launch, target: str, capped: int | None) -> Planned:
    """The record of a launch."""
    return Planned(
        op=op,
        kernel=launch.kernel.__name__,
        dtype=dtype,
        target=target,
        constants=dict(launch.constants),
        sizes={name: n for name, n in launch.arguments.items() if isinstance(n, int)},
        tensors={
            name: None if value is None else NAMES[value.dtype]
            for name, value in launch.arguments.items()
            if value is None or isinstance(value, Tensor)
        },
        warps=launch.num_warps,
        stages=launch.num_stages,
        capped=capped,
    )


def representatives(
    launches: Sequence[tuple[Planned, Specialised]], dtype: str
) -> list[tuple[Planned, Specialised]]:
    """One launch of every kernel, in this dtype if it has one."""
    chosen: dict[tuple[str, str], tuple[Planned, Specialised]] = {}
    for launch in sorted(launches, key=lambda launch: launch[0].dtype != dtype):
        chosen.setdefault((launch[1].module, launch[1].kernel), launch)
    return list(chosen.values())


if __name__ == "__main__":
    main()
