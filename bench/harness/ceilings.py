"""What the device itself reaches in this run: bandwidth of a copy, rate of a matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.harness.case import CLOCK, DTYPES, LOOP, SEED
from bench.harness.measure import SECONDS, Call, measure
from bench.harness.results import Ceilings
from degmix_kernels.contract import Work

# Large enough to leave the caches and to fill a GPU; on a CPU small enough not to be waited for.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 512}
# Large: an H200 then has that long to do with fewer launches than their queue holds, and the host goes on.
SECONDS_AT_WORK, SIZE_AT_WORK = 3, 12288


def measure_ceilings(device: torch.device, dtypes: tuple[str, ...]) -> Ceilings:
    """Copy a large buffer and multiply large matrices, of random numbers: zeros are multiplied faster.

    Products of fp32 are computed as ``torch.backends.cuda.matmul`` says, exactly by default.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    size = (COPY_BYTES[device.type],)
    source = torch.randint(256, size, generator=generator, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copying = measure(Call(lambda: None, lambda _: target.copy_(source)), _timer(device))
    matrix = {name: _product_rate(device, DTYPES[name], SECONDS) for name in dtypes}
    return Ceilings(2 * source.nbytes / (copying.ms / 1e3), matrix)


@contextmanager
def at_work(device: torch.device) -> Iterator[None]:
    """Keep a GPU multiplying meanwhile, for some seconds: its clocks are then those of work."""
    if device.type == "cuda":
        products = products_at_work(_product_rate(device, torch.bfloat16, seconds=0))
        left, right, product = torch.randn((3, SIZE_AT_WORK, SIZE_AT_WORK), device=device).bfloat16()
        for _ in range(products):
            torch.mm(left, right, out=product)
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()


def products_at_work(rate: float) -> int:
    """How many products keep a GPU of so many FLOPs per second at work, at least one."""
    return max(1, round(SECONDS_AT_WORK * rate / _product_flops(SIZE_AT_WORK)))


def speed_of_light(work: Work, ms: float, ceilings: Ceilings, dtype: str) -> float | None:
    """Time that the work takes at the ceilings, over the measured time; None without ceilings."""
    if ceilings.copy is None or dtype not in ceilings.matrix:
        return None
    return max(work.bytes / ceilings.copy, work.flops / ceilings.matrix[dtype]) / (ms / 1e3)


def _product_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """FLOPs per second of a large product; ``seconds`` to spend."""
    size = PRODUCT_SIZE[device.type]
    generator = torch.Generator(device).manual_seed(SEED)
    left, right = torch.randn((2, size, size), generator=generator, device=device).to(dtype)
    product = torch.empty_like(left)
    call = Call(lambda: None, lambda _: torch.mm(left, right, out=product))
    return _product_flops(size) / (measure(call, _timer(device), seconds).ms / 1e3)


def _product_flops(size: int) -> int:
    return 2 * size**3


def _timer(device: torch.device) -> str:
    return LOOP if device.type == "cuda" else CLOCK
