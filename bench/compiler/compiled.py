"""What a compiler made of one launch for one target, as one record, and what may not be so."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bench.compiler.targets import TARGETS, Occupancy, Target, occupancy

# What gained by a cap on an H100 spills up to 32 with it, in bf16; fp16 and other sizes spill more.
SPILLED_UNDER_A_CAP = 88  # bytes, the most that any of them spills with Triton 3.6


@dataclass(frozen=True)
class Planned:
    """One launch, planned for one target.

    Attributes:
        op: label of the op in ``degmix_kernels.registry``.
        kernel: name of the kernel.
        dtype: "fp32", "bf16" or "fp16": that of the op's inputs.
        target: name of the target.
        constants: ``tl.constexpr`` arguments of the launch, by name.
        sizes: integer arguments, by name.
        tensors: dtype of each tensor, by name; None for one that the launch goes without.
        warps: warps per program.
        stages: depth of the software pipeline.
        capped: most registers per lane that the launch allows, None for any number.
    """

    op: str
    kernel: str
    dtype: str
    target: str
    constants: dict[str, Any]
    sizes: dict[str, int]
    tensors: dict[str, str | None]
    warps: int
    stages: int
    capped: int | None

    @property
    def configuration(self) -> str:
        """Constants, sizes, and tensors that are left out or of another dtype than ``dtype``, in one line.

        What is off, or 1, is left out: a new flag then leaves the launches that do not set it as they were.
        """
        words = [
            name if value is True else f"{name}={value}"
            for name, value in {**self.constants, **self.sizes}.items()
            if value is True or (value is not None and value is not False and value != 1)
        ]
        words += [f"{name}={dtype}" for name, dtype in self.tensors.items() if dtype != self.dtype]
        return " ".join(words)

    @property
    def key(self) -> tuple[str, str, str, str, int, int]:
        """What tells this launch from every other one of the same target."""
        return self.op, self.kernel, self.dtype, self.configuration, self.warps, self.stages


@dataclass(frozen=True)
class Compiled(Planned):
    """The same, compiled.

    Attributes:
        registers: registers per lane.
        spilled: bytes (AMD: registers and bytes) per lane that do not fit in registers.
        shared: bytes of shared memory per program.
        tensor_memory: columns of Blackwell's tensor memory per program.
        products: whether the kernel has matrix products.
        matrix: the instruction that computes them on matrix units, the target's own if it is there, or None.
        loads: bits per lane → number of load instructions from global memory.
        reductions: bits per lane → number of atomic additions into global memory.
    """

    registers: int
    spilled: int
    shared: int
    tensor_memory: int
    products: bool
    matrix: str | None
    loads: dict[str, int]
    reductions: dict[str, int]

    @property
    def on(self) -> Target:
        """The target itself."""
        return TARGETS[self.target]

    @property
    def occupancy(self) -> Occupancy:
        """How much of a multiprocessor the kernel can fill."""
        return occupancy(self.on, self.warps, self.registers, self.shared, self.tensor_memory)

    def to_json(self) -> dict[str, Any]:
        """Every field, and the occupancy."""
        return {**asdict(self), "occupancy": asdict(self.occupancy)}


def spills(row: Compiled) -> bool:
    """Whether it spills more than it may: nothing, or under a cap on its registers a few bytes."""
    return row.spilled > (0 if row.capped is None else SPILLED_UNDER_A_CAP)


def faults(row: Compiled) -> list[str]:
    """What no kernel may do with any compiler: want more shared memory than there is, multiply by hand."""
    found = []
    limit = row.on.shared_of_program
    if row.shared > limit:
        found.append(f"needs {row.shared} bytes of shared memory; {row.target} has {limit}")
    # The planar kernels of deform_conv may use the older instruction: the newer ones have no use for 16 out
    # channels or, on Blackwell, 16 warps, and bytes, not products, are what these kernels wait for.
    enough = row.matrix == row.on.matrix or (row.matrix is not None and "(general)" not in row.op)
    if row.products and row.dtype != "fp32" and not enough:
        found.append(f"computes {row.dtype} products with {row.matrix or 'no matrix instruction'}")
    return found
