"""Deformable convolution on a GPU: what the interpreter cannot show. The other tests run on the GPU, too."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from contract import compare, deterministic_algorithms, leaves_of
from deform_conv_cases import PATHS, Call, forced_triton, kernels_of
from launches import recorded_launches
from test_deform_conv_memory import REALISTIC, allowance
from torch import Tensor

from degmix_kernels import deform_conv2d
from degmix_kernels.deform_conv import reference
from degmix_kernels.launch import needs_64_bit
from degmix_kernels.testing import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA is not available")

every_path = pytest.mark.parametrize("path", PATHS)


def run(call: Call, leaves: dict[str, Tensor], grad: Tensor) -> list[Tensor]:
    """The output and all gradients, on Triton."""
    with forced_triton():
        output = deform_conv2d(**leaves, **call.geometry)
        return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), grad)]


def prepared(call: Call, device: str = "cuda", dtype: torch.dtype = torch.float32) -> tuple[dict, Tensor]:
    """Leaves of a call, and a gradient of its output."""
    leaves = {name: value.requires_grad_() for name, value in call.tensors(dtype, device).items()}
    generator = torch.Generator().manual_seed(1)
    shape = (call.batch, call.out_channels, *call.out_size)
    return leaves, torch.randn(shape, generator=generator).to(device, dtype)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Let every wait of the host for the GPU raise."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_path
def test_the_host_never_waits(path: str) -> None:
    call = PATHS[path]
    leaves, grad = prepared(call)
    for deterministic in (False, True):
        with deterministic_algorithms(deterministic):
            run(call, leaves, grad)  # compiles the kernels
            with no_synchronisation():
                run(call, leaves, grad)


@every_path
def test_cuda_graph(path: str) -> None:
    """Forward and backward, captured once, compute from the values that lie in the inputs at replay."""
    call = PATHS[path]
    leaves, grad = prepared(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and fills the allocator's and autograd's caches
            run(call, leaves, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call, leaves, grad)
    fresh = {name: value.to("cuda") for name, value in call.tensors(seed=5).items()}
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    results = [each.clone() for each in captured]
    expected = run(call, leaves_of(fresh), grad)
    for mine, other in zip(results, expected, strict=True):
        assert_close(mine, other.double(), call.reduction)
    graph.replay()  # accumulators are cleared within the graph
    torch.cuda.synchronize()
    for mine, other in zip(captured, expected, strict=True):
        assert_close(mine, other.double(), call.reduction)


@every_path
def test_side_stream(path: str) -> None:
    call = PATHS[path]
    leaves, grad = prepared(call)
    expected = run(call, leaves, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The inputs are not ready before the stream has slept; launches on another stream would not wait.
        late = {name: torch.full_like(value, torch.nan) for name, value in leaves.items()}
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for name, value in leaves.items():
                late[name].copy_(value)
        results = run(call, {name: value.requires_grad_() for name, value in late.items()}, grad)
    stream.synchronize()
    for mine, other in zip(results, expected, strict=True):
        assert_close(mine, other.double(), call.reduction)


@every_path
def test_second_device(path: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    call = PATHS[path]
    expected = run(call, *prepared(call))
    assert torch.cuda.current_device() == 0
    results = run(call, *prepared(call, "cuda:1"))
    assert torch.cuda.current_device() == 0
    for mine, other in zip(results, expected, strict=True):
        assert mine.device == torch.device("cuda:1")
        assert_close(mine.cpu(), other.double().cpu(), call.reduction)


@every_path
def test_deterministic_runs_are_bit_equal(path: str) -> None:
    """At a size at which thousands of programs race for the same input pixels."""
    call = replace(PATHS[path], batch=4, size=(64, 48))
    leaves, grad = prepared(call)
    with deterministic_algorithms():
        first, *others = (run(call, leaves, grad) for _ in range(4))
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_weight_gradient_of_a_large_map() -> None:
    """pytorch/vision issue 2598: a sum over 880 000 output pixels per element."""
    call = Call(8, 9, 9, (1000, 110), (3, 3), padding=(1, 1), biased=False)
    ours, exact = (partial(each, **call.geometry) for each in (deform_conv2d, reference.deform_conv2d))
    compare(ours, exact, call.tensors(device="cuda"), call.reduction, wanted=("weight",))


# More than 2³¹ elements of the input (general, between) or the offsets (per-channel), within one image where
# that is the harder case. bf16; a GPU of 80 GB holds each.
HUGE = {
    "general": Call(3, 256, 16, (1700, 1700), offset_groups=1),
    "general, one image": Call(1, 256, 16, (2900, 2900), offset_groups=1),
    "per-channel": Call(3, 64, 16, (2400, 2400), offset_groups=64, masked=False),
    "per-channel, one image": Call(1, 64, 16, (4100, 4100), offset_groups=64, masked=False),
    "between": Call(3, 128, 16, (2400, 2400), offset_groups=16, masked=False),
}


@pytest.mark.parametrize("name", HUGE)
def test_beyond_32_bits(name: str) -> None:
    """The last rows of the last image lie beyond; they equal a small call on these rows alone."""
    call, rows = HUGE[name], 6
    shapes = call.shapes()
    needed = 10 * sum(torch.Size(shape).numel() for shape in shapes.values())  # tensors, gradients, fp32 sums
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    tensors = {key: draw(shape) for key, shape in shapes.items()}
    if name == "general":  # whose kernels then read all images in one launch
        tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    tensors["offset"].clamp_(-1.5, 1.5)  # the rows compared then sample rows of the small call only
    grad = draw((call.batch, call.out_channels, *call.out_size))
    grad[..., : -(rows - 4), :] = 0  # then no other row adds to the last ones, nor to the weight's gradient
    grad[:-1] = 0
    assert needs_64_bit(*tensors.values())
    leaves = {key: value.requires_grad_() for key, value in tensors.items()}
    with recorded_launches() as launches:
        results = dict(zip(("output", *leaves), run(call, leaves, grad), strict=True))
    assert kernels_of(launches) == {"general" if name.startswith("general") else "planar"}

    small = replace(call, batch=1, size=(rows, call.size[1]))
    cut = {
        key: value.detach()[-1:, :, -rows:] if value.dim() == 4 and key != "weight" else value.detach()
        for key, value in leaves.items()
    }
    exact = {key: value.contiguous().float().requires_grad_() for key, value in cut.items()}
    expected = dict(
        zip(("output", *exact), run(small, exact, grad[-1:, :, -rows:].contiguous().float()), strict=True)
    )
    for key, value in expected.items():
        mine = results[key]
        if mine.dim() == 4 and key != "weight":
            # The small call's first rows sample rows that it does not have.
            mine, value = mine[-1:, :, -(rows - 3) :], value[:, :, -(rows - 3) :]
        assert_close(mine, value.double(), small.reduction, torch.bfloat16, key)
    del leaves, tensors, results, grad, cut
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", REALISTIC)
def test_peak_memory(name: str, dtype: torch.dtype) -> None:
    """What the allocator counts agrees with what test_deform_conv_memory.py counts without a GPU."""
    call = REALISTIC[name]
    leaves, grad = prepared(call, dtype=dtype)
    run(call, leaves, grad)  # compiles
    rounding = 12 * 2**20  # blocks may be 1 MiB larger than asked for, and about a dozen are alive

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with forced_triton():
        output = deform_conv2d(**leaves, **call.geometry)
    forward = torch.cuda.max_memory_allocated() - before - output.nbytes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(output, list(leaves.values()), grad)
    backward = torch.cuda.max_memory_allocated() - before - sum(each.nbytes for each in gradients)

    limit, whole = allowance(call, dtype, False, "contiguous"), call.columns * dtype.itemsize
    for phase, size in {"forward": forward, "backward": backward}.items():
        share = f"{phase}: {size / 2**20:.1f} MiB, {100 * size / whole:.1f} % of the column buffer"
        print(f"{name}, {dtype}, {share}")
        assert size <= limit + rounding, f"{share}, at most {limit / 2**20:.1f} MiB"
