"""What the device reaches: copies, products, its L2 cache, scattered additions, gathers."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.cases.shapes import NYUD, SMALL_OFFSETS, WILD_OFFSETS
from bench.gpu.decide.common import BF16, FP32, SMALL_MAP, model_offsets, multiply_fp32, results_of
from bench.gpu.decide.meter import Meter
from bench.harness.case import LOOP
from degmix_kernels.backend import INTERPRETED
from degmix_kernels.launch import Launch
from degmix_kernels.maps import ceil_div

BLOCK = 1024  # elements of a program


@triton.jit
def read_again(x_ptr, sums_ptr, blocks, programs, steps, BLOCK: tl.constexpr):
    """Sum ``steps`` blocks, which other programs read, too."""
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, steps):
        block = (program + step * programs) % blocks
        total += tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")  # not from L1
    tl.store(sums_ptr + program, tl.sum(total))


@triton.jit
def add_corners(index_ptr, out_ptr, size, width, CORNERS: tl.constexpr, BLOCK: tl.constexpr):
    """Add 1 at an index, or at the four corners that begin there; nothing where it is negative."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + at, mask=at < size, other=-1)
    one, valid = index * 0.0 + 1.0, index >= 0
    tl.atomic_add(out_ptr + index, one, mask=valid, sem="relaxed")
    if CORNERS == 4:
        tl.atomic_add(out_ptr + index + 1, one, mask=valid, sem="relaxed")
        tl.atomic_add(out_ptr + index + width, one, mask=valid, sem="relaxed")
        tl.atomic_add(out_ptr + index + width + 1, one, mask=valid, sem="relaxed")


@triton.jit
def add_vectors(out_ptr, BLOCK: tl.constexpr):
    """Add 1 to four floats at a time, by one instruction."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    one_to_four: tl.constexpr = """
    {
        .reg .f32 one;
        mov.f32 one, 0f3F800000;
        red.relaxed.gpu.global.add.v4.f32 [$1], {one, one, one, one};
        mov.u32 $0, 0;
    }
    """
    tl.inline_asm_elementwise(one_to_four, "=r,l", [out_ptr + 4 * at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def gather_rows(x_ptr, index_ptr, out_ptr, pixels, width, steps, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum rows of CHANNELS bf16 at ``steps`` places around each pixel's index."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = pixel < pixels
    index = tl.load(index_ptr + pixel, mask=valid, other=0)
    channel = tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for step in range(0, steps):
        at = index + step // 6 * width + step % 6
        total += tl.load(x_ptr + at[:, None] * CHANNELS + channel, mask=valid[:, None], other=0.0).to(
            tl.float32
        )
    tl.store(out_ptr + pixel, tl.sum(total, 1), mask=valid)


def rows(meter: Meter) -> None:
    """The section."""
    memory(meter)
    products(meter)
    cache(meter)
    additions(meter)
    gathers(meter)


def memory(meter: Meter) -> None:
    """Copy, read, write."""
    size = 2**20 if meter.dry else 2**30
    source = torch.zeros(size, dtype=torch.uint8, device=meter.device)
    target = torch.empty_like(source)
    meter.row("device copy", f"{size >> 20} MiB", lambda: target.copy_(source), bytes=2 * size)
    meter.row("device read", "sum fp32", lambda: source.view(FP32).sum(), bytes=size)
    meter.row("device write", "zero", lambda: target.zero_(), bytes=size)


def products(meter: Meter) -> None:
    """Large products."""
    side = 128 if meter.dry else 8192
    left, right = torch.randn(2, side, side, device=meter.device)
    narrow = left.to(BF16), right.to(BF16)
    meter.row("product", f"bf16 {side}", lambda: narrow[0] @ narrow[1], flops=2 * side**3)
    meter.row("product", f"tf32 {side}", lambda: multiply_fp32(left, right, tf32=True), flops=2 * side**3)
    left, right, half = left[: side // 2, : side // 2], right[: side // 2, : side // 2], side // 2
    meter.row("product", f"fp32 {half}", lambda: multiply_fp32(left, right, tf32=False), flops=2 * half**3)


def cache(meter: Meter) -> None:
    """Reads that find everything in the L2 cache."""
    block, programs, steps = 2048, 16 if meter.dry else 132 * 8, 4 if meter.dry else 64
    for mebibytes in (1,) if meter.dry else (8, 24):
        x, sums = torch.ones(mebibytes << 18, device=meter.device), torch.empty(programs, device=meter.device)
        arguments = {"x_ptr": x, "sums_ptr": sums, "blocks": x.numel() // block, "programs": programs}
        launch = Launch(read_again, programs, arguments | {"steps": steps}, {"BLOCK": block})
        meter.row(
            "L2 read",
            f"{mebibytes} MiB, again and again",
            results_of(launch, sums),
            expected=lambda sums=sums: torch.full_like(sums, block * steps),
            bytes=4 * block * programs * steps,
            timer=LOOP,
        )


def additions(meter: Meter) -> None:
    """Scattered fp32 additions, in the planes of a gradient of ``deform_mix``'s input."""
    shape, device = SMALL_MAP if meter.dry else NYUD, meter.device
    count = shape.batch * shape.channels * shape.pixels
    sums = torch.zeros(count + 2 * shape.width + 8, device=device)
    maps = torch.zeros(shape.batch, shape.channels, shape.height, shape.width, device=device)

    def drawn(spread: float) -> Tensor:
        return spread * torch.randn(shape.batch, 2 * shape.channels, shape.height, shape.width, device=device)

    indices = {
        "contiguous": lambda: torch.arange(count, dtype=torch.int32, device=device),
        "sigma 1": lambda: corner_index(drawn(SMALL_OFFSETS)),
        "sigma 30": lambda: corner_index(drawn(WILD_OFFSETS)),
        "as the model": lambda: corner_index(model_offsets(maps)),
    }
    for what, make in indices.items():
        index = make()
        for corners in (1, 4) if what == "contiguous" else (4,):
            arguments = {"index_ptr": index, "out_ptr": sums, "size": count, "width": shape.width}
            constants = {"CORNERS": corners, "BLOCK": BLOCK}
            meter.row(
                "RED fp32",
                f"scalars, {what}" if corners == 1 else f"4 corners, {what}",
                results_of(Launch(add_corners, ceil_div(count, BLOCK), arguments, constants), sums),
                operations=partial(lambda index, corners: corners * int((index >= 0).sum()), index, corners),
            )
    if not INTERPRETED:  # the interpreter has no inline assembly
        launch = Launch(add_vectors, count // (4 * BLOCK), {"out_ptr": sums}, {"BLOCK": BLOCK})
        meter.row("RED fp32", "vectors of 4, contiguous", results_of(launch, sums), operations=count)


def corner_index(offset: Tensor) -> Tensor:
    """Index of the upper left corner of every sample, -1 where not all four corners are on the map."""
    batch, doubled, height, width = offset.shape
    planes = batch * doubled // 2
    y, x = offset.view(planes, 2, height, width).floor().long().unbind(1)
    y = y + torch.arange(height, device=offset.device)[:, None]
    x = x + torch.arange(width, device=offset.device)
    inside = (y >= 0) & (x >= 0) & (y < height - 1) & (x < width - 1)
    first = torch.arange(planes, device=offset.device)[:, None, None] * height * width
    return torch.where(inside, first + y * width + x, -1).int()


def gathers(meter: Meter) -> None:
    """Rows of channels, at six by six places around each pixel, which is moved by a random offset."""
    images, height, width, steps = (1, 8, 16, 4) if meter.dry else (8, 100, 152, 36)
    device, pixels = meter.device, images * height * width
    first = torch.arange(images, device=device)[:, None, None] * height * width
    for channels in (16, 32, 64, 256):
        maps = torch.ones(pixels + 8 * width, channels, dtype=BF16, device=device)
        for spread in (SMALL_OFFSETS, WILD_OFFSETS):
            y, x = (spread * torch.randn(2, images, height, width, device=device)).round().long()
            y = (y + torch.arange(height, device=device)[:, None]).clamp(0, height - 7)
            x = (x + torch.arange(width, device=device)).clamp(0, width - 7)
            sums = torch.empty(pixels, device=device)
            arguments = {"x_ptr": maps, "index_ptr": (first + y * width + x).int(), "out_ptr": sums}
            sizes = {"pixels": pixels, "width": width, "steps": steps}
            constants = {"CHANNELS": channels, "BLOCK": 4096 // channels}
            programs = ceil_div(pixels, constants["BLOCK"])
            meter.row(
                f"gather {2 * channels} B a pixel",
                f"sigma {spread:.0f}, {steps} around each",
                results_of(Launch(gather_rows, programs, arguments | sizes, constants, num_warps=8), sums),
                expected=partial(torch.full_like, sums, channels * steps),
                bytes=2 * channels * pixels * steps,
            )
