"""What the device itself reaches in this run: bandwidth of a copy, rate of a matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.cases import CLOCK, DTYPES, LOOP, SEED
from bench.measure import Call, measure
from bench.results import Ceilings
from degmix_kernels.contract import Work

# Large enough to leave the caches and to fill a GPU; on a CPU small enough not to be waited for.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 512}
# Some seconds of work, in fewer launches than their queue holds, so that the host does not wait.
PRODUCTS_AT_WORK, SIZE_AT_WORK = 600, 12288


def measure_ceilings(device: torch.device, dtypes: tuple[str, ...]) -> Ceilings:
    """Copy a large buffer and multiply large matrices, of random numbers: zeros are multiplied faster.

    Args:
        device: where.
        dtypes: names of the dtypes to multiply in; fp32 as ``torch.backends.cuda.matmul`` says, exactly by
            default.
    """
    timer = LOOP if device.type == "cuda" else CLOCK
    generator = torch.Generator(device).manual_seed(SEED)
    source = torch.randint(256, (COPY_BYTES[device.type],), generator=generator, device=device).byte()
    target = torch.empty_like(source)
    copying = measure(Call(lambda: None, lambda _: target.copy_(source)), timer)
    size, matrix = PRODUCT_SIZE[device.type], {}
    for name in dtypes:
        drawn = torch.randn((2, size, size), generator=generator, device=device).to(DTYPES[name])
        product = torch.empty_like(drawn[0])
        left, right = drawn.unbind()
        call = Call(lambda: None, lambda _, a=left, b=right, c=product: torch.mm(a, b, out=c))
        matrix[name] = 2 * size**3 / _seconds(measure(call, timer).ms)
    return Ceilings(2 * source.nbytes / _seconds(copying.ms), matrix)


@contextmanager
def at_work(device: torch.device) -> Iterator[None]:
    """Keep a GPU multiplying meanwhile, for some seconds at most: its clocks are then those of work."""
    if device.type == "cuda":
        left, right, product = torch.randn((3, SIZE_AT_WORK, SIZE_AT_WORK), device=device).bfloat16()
        for _ in range(PRODUCTS_AT_WORK):
            torch.mm(left, right, out=product)
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()


def speed_of_light(work: Work, ms: float, ceilings: Ceilings, dtype: str) -> float | None:
    """Time that the work takes at the ceilings, over the measured time; None without ceilings."""
    if ceilings.copy is None or dtype not in ceilings.matrix:
        return None
    return max(work.bytes / ceilings.copy, work.flops / ceilings.matrix[dtype]) / _seconds(ms)


def _seconds(ms: float) -> float:
    return ms / 1e3
