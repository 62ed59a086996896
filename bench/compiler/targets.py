"""The GPUs that kernels are compiled for without having one, and how many programs each runs at once.

Both makers divide a multiprocessor (AMD: compute unit) into four schedulers, each with 512 registers per
lane that are given out to warps (wavefronts) in eights; so one rule serves both, and :data:`TARGETS` has what
differs. Where that is from:

- NVIDIA: CUDA C++ Programming Guide, table of technical specifications per compute capability (8.0, 9.0,
  10.0), and the rule itself from ``cuda_occupancy.h``, which the CUDA toolkit and Triton's wheel carry.
- AMD: AMDGPUBaseInfo.cpp of LLVM (gfx90a and gfx942: ``getVGPRAllocGranule``, ``getTotalNumVGPRs``,
  ``getMaxWavesPerEU``, ``getLdsDwGranularity``); the compiler prints what it makes of them as "Occupancy".
"""

from __future__ import annotations

from dataclasses import dataclass

from degmix_kernels.maps import ceil_div

KIB = 1024
SCHEDULERS = 4  # of a multiprocessor
REGISTERS = 512  # per lane of a scheduler
REGISTER_GRANULE = 8  # registers per lane that are given to a warp at once


@dataclass(frozen=True)
class Target:
    """What a GPU has, as far as it limits how many programs run at once.

    Attributes:
        name: what users call it.
        backend: Triton's name of the maker: "cuda" or "hip".
        arch: Triton's name of the architecture.
        lanes: threads per warp.
        warps: most warps on a multiprocessor.
        programs: most programs on a multiprocessor.
        shared: bytes of shared memory on a multiprocessor, at its largest share of the cache.
        shared_of_program: most bytes that one program may use.
        shared_reserved: bytes that the driver adds to each program.
        shared_granule: bytes in which shared memory is given out.
        tensor_memory: columns of Blackwell's memory for matrix products; 0 elsewhere.
        matrix: the generation's own matrix instruction, as the compiler's output has it.
        older_matrix: that of generations before which it runs, too, at a lower rate.
    """

    name: str
    backend: str
    arch: int | str
    lanes: int
    warps: int
    programs: int
    shared: int
    shared_of_program: int
    shared_reserved: int
    shared_granule: int
    tensor_memory: int
    matrix: str
    older_matrix: str | None = None


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 64, 32, 164 * KIB, 163 * KIB, KIB, 128, 0, "mma.sync"),
        Target(
            "sm_90", "cuda", 90, 32, 64, 32, 228 * KIB, 227 * KIB, KIB, 128, 0, "wgmma.mma_async", "mma.sync"
        ),
        Target(
            "sm_100", "cuda", 100, 32, 64, 32, 228 * KIB, 227 * KIB, KIB, 128, 512, "tcgen05.mma", "mma.sync"
        ),
        Target("gfx942", "hip", "gfx942", 64, 32, 32, 64 * KIB, 64 * KIB, 0, 512, 0, "v_mfma"),
    )
}


@dataclass(frozen=True)
class Occupancy:
    """How much of a multiprocessor a kernel can fill, if there are programs enough.

    Attributes:
        programs: programs on a multiprocessor at once; 0 if not even one fits.
        warps: their warps.
        share: of the warps that a multiprocessor can hold.
    """

    programs: int
    warps: int
    share: float


def occupancy(target: Target, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> Occupancy:
    """Theoretical occupancy, from registers, shared memory and warps (and Blackwell's tensor memory).

    The arguments are as of :class:`bench.compiler.compiled.Compiled`. On AMD registers are those of both
    kinds; scalar ones are left out: they never leave room for fewer than seven warps per scheduler.
    """
    held = _round_up(max(registers, 1), REGISTER_GRANULE)
    # The hardware accepts a program as if its warps came in rounds of all schedulers.
    fits = ceil_div(warps, SCHEDULERS) * held <= REGISTERS and shared <= target.shared_of_program
    taken = _round_up(shared + target.shared_reserved, target.shared_granule)
    programs = min(
        target.programs,
        target.warps // warps,
        REGISTERS // held * SCHEDULERS // warps,
        target.shared // taken if taken else target.programs,
        target.tensor_memory // tensor_memory if tensor_memory else target.programs,
    )
    programs = programs if fits else 0
    return Occupancy(programs, programs * warps, programs * warps / target.warps)


def _round_up(value: int, granule: int) -> int:
    return ceil_div(value, granule) * granule
