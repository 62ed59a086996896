"""Whether Triton's front end accepts every kernel as a GPU would ask for it, without a GPU.

A launch makes an integer argument that is 1 a constant, and tells the compiler which integers and addresses
are multiples of 16. Some code is then refused that the interpreter runs: ``(parts // blocks).to(tl.float64)``
has no ``to`` where both are 1. The front end alone (source → TTIR) finds this in a fraction of a second.

The launches are those of the contract's samples (every op, every dtype, forward and backward, with tensors as
they are and with tensors one element behind an aligned address) and those that are planned for the compile
check. Each is checked as it is. Fuzzing then forces integers to 1, one at a time and all together, whatever
their value; for NVIDIA's targets alone: an integer that is 1 means the same to every target.

``--full`` checks every specialisation, each of them again with all its integers forced to 1, and one of each
kernel and set of switches with one integer at a time. Without it, few specialisations represent the others.
They are chosen greedily, so that each of these facts about a kernel holds for at least one of them:

- an argument has this type, or is None;
- an integer argument is 1, or a multiple of 16, or neither; an address is aligned, or is not;
- a switch (a ``tl.constexpr`` argument that is no number) has this value;
- exactly these integers are 1.

All integers at once are then forced in a representative of each kernel and set of switches, one integer at a
time in a representative of each kernel.

Prints one JSON line for each refusal, then one with the counts. The exit code is 1 if anything was refused.
Only in a process without TRITON_INTERPRET: whether a kernel is compiled or interpreted is settled when it is
defined.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from bench.compiler.targets import TARGETS
from bench.compiler.trace import Specialised, launches_of, specialise, traced
from bench.harness.case import SEED
from bench.harness.command import FAILURE, USER_ERROR
from degmix_kernels.backend import INTERPRETED, KERNEL_DTYPES
from degmix_kernels.contract import Op
from degmix_kernels.launch import Launch
from degmix_kernels.registry import OPS

INTEGERS = ("i32", "i64")

Fact = tuple[str, str, object]
"""Kernel, what it is about, value."""


@dataclass(frozen=True)
class Candidate:
    """A launch to check.

    Attributes:
        op: label of the op that launches it.
        launch: the launch.
        forced: the integers that are 1 although the op gave them another value.
        specialised: what the front end is given.
    """

    op: str
    launch: Launch
    forced: tuple[str, ...] = ()
    specialised: Specialised = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "specialised", specialise(self.launch))


def launches() -> Iterator[tuple[str, Launch]]:
    """Label of an op and launch, of all that the contract's samples make and the plans name."""
    for dtype in KERNEL_DTYPES:
        for op in OPS:
            found = *sampled(op, dtype, True), *sampled(op, dtype, False), *launches_of(op, dtype)
            yield from ((op.label, launch) for launch in found)


def sampled(op: Op, dtype: torch.dtype, aligned: bool) -> list[Launch]:
    """What the op's samples launch, forward and backward."""
    seen: list[Launch] = []
    for sample in op.samples(torch.device("cpu"), dtype, torch.Generator().manual_seed(SEED)):
        arguments = {
            name: unaligned(value) if isinstance(value, Tensor) and not aligned else value
            for name, value in sample.arguments.items()
        }
        leaves = [name for name in op.differentiable if isinstance(arguments.get(name), Tensor)]
        for name in leaves:
            arguments[name] = arguments[name].detach().requires_grad_()
        with traced(seen.append):
            output = op.function(**arguments)
            gradient = torch.ones_like(output)
            gradient = gradient if aligned else unaligned(gradient)
            torch.autograd.grad(output, [arguments[name] for name in leaves], gradient)
    return seen


def unaligned(tensor: Tensor) -> Tensor:
    """The same values and strides, one element behind an aligned address."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = torch.empty(elements + 1, dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() + 1).copy_(tensor)


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The first of those that are compiled to the same."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.specialised.key, candidate)
    return list(found.values())


def forced(candidate: Candidate, names: Sequence[str]) -> Candidate:
    """The same with these integer arguments equal to 1."""
    arguments = dict(candidate.launch.arguments) | dict.fromkeys(names, 1)
    return Candidate(candidate.op, candidate.launch._replace(arguments=arguments), tuple(names))


def to_check(found: Sequence[Candidate], fuzz: bool, full: bool) -> list[Candidate]:
    """Those that are checked, and what fuzzing makes of them; the module's docstring says how many."""
    chosen = list(found) if full else covering(found)
    fuzzed, done = [], set()
    for candidate in chosen if fuzz else ():
        kernel, signature = name_of(candidate.specialised), candidate.specialised.signature
        names = [name for name, kind in signature.items() if kind in INTEGERS]  # that are not 1
        pattern = kernel, switches(candidate.specialised)
        if full or pattern not in done:
            fuzzed.append(forced(candidate, names))
        if (pattern if full else kernel) not in done:
            fuzzed += [forced(candidate, [name]) for name in names]
        done |= {kernel, pattern}
    return distinct([*chosen, *fuzzed])


def covering(found: Sequence[Candidate]) -> list[Candidate]:
    """Candidates for which, together, every fact holds that holds for any; the greediest choice first."""
    missing = {index: facts(candidate.specialised) for index, candidate in enumerate(found)}
    chosen = []
    while missing:
        best = max(missing, key=lambda index: len(missing[index]))
        chosen.append(found[best])
        covered = missing[best]
        left = ((index, those - covered) for index, those in missing.items())
        missing = {index: those for index, those in left if those}
    return chosen


def facts(specialised: Specialised) -> set[Fact]:
    """What a representative can stand for."""
    kernel, ones = name_of(specialised), []
    found: set[Fact] = {(kernel, *switch) for switch in switches(specialised)}
    for position, (name, kind) in enumerate(specialised.signature.items()):
        if kind != "constexpr":
            found |= {(kernel, name, kind), (kernel, name, bool(specialised.attributes.get((position,))))}
        elif specialised.constants[name] == 1 and not name.isupper():  # tl.constexpr arguments are upper case
            found.add((kernel, name, 1))
            ones.append(name)
    return found | {(kernel, "ones", tuple(ones))}


def switches(specialised: Specialised) -> tuple[tuple[str, str], ...]:
    """The constants that turn branches of the kernel on and off, None in place of a tensor included."""
    return tuple(
        (name, repr(value))
        for name, value in sorted(specialised.constants.items())
        if value is None or isinstance(value, (bool, str))
    )


def name_of(specialised: Specialised) -> str:
    """The kernel's name, unlike any other's."""
    return f"{specialised.module}.{specialised.kernel}"


def refusal(specialised: Specialised, gpu: GPUTarget) -> str | None:
    """What Triton's front end has against it; None if it is accepted."""
    backend = make_backend(gpu)
    options = backend.parse_options(specialised.options(gpu))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    try:
        specialised.source.make_ir(gpu, options, functions, backend.get_module_map(), context)
    except Exception as error:  # Triton refuses with exceptions of many kinds
        return f"{type(error).__name__}: {error}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Check for one target; 1 if anything was refused."""
    parser = argparse.ArgumentParser("python -m bench.gpu.front_end", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--full", action="store_true", help="every specialisation, not only representatives")
    chosen = parser.parse_args(arguments)
    if INTERPRETED:
        print("front_end: TRITON_INTERPRET is set; kernels are then not compiled", file=sys.stderr)
        return USER_ERROR
    target = TARGETS[chosen.target]
    gpu = GPUTarget(target.backend, target.arch, target.lanes)
    version = "none, but compiled for" if target.backend == "hip" else None
    with patch.object(torch.version, "hip", version):  # plans ask it for whom they plan
        found = distinct(Candidate(op, launch) for op, launch in launches())
    checked = to_check(found, fuzz=gpu.backend == "cuda", full=chosen.full)
    refused = 0
    for candidate in checked:
        specialised = candidate.specialised
        if (error := refusal(specialised, gpu)) is not None:
            refused += 1
            row = {
                "target": target.name,
                "op": candidate.op,
                "kernel": name_of(specialised),
                "forced": candidate.forced,
                "signature": specialised.signature,
                "constants": specialised.constants,
                "error": error,
            }
            print(json.dumps(row), flush=True)
    counts = {
        "target": target.name,
        "kernels": len({name_of(candidate.specialised) for candidate in found}),
        "launched": len(found),
        "checked": len(checked),
        "forced": sum(bool(candidate.forced) for candidate in checked),
        "refused": refused,
    }
    print(json.dumps(counts))
    return FAILURE if refused else 0


if __name__ == "__main__":
    sys.exit(main())
