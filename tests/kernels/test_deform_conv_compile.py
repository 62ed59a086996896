"""``deform_conv2d`` inside compilers, on each path; batch sizes alone are for test_contract.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import leaves_of
from deform_conv_cases import PATHS, Call, expected_kernels, forced_triton, gradients, kernels_of
from launches import recorded_launches
from torch._dynamo.testing import CompileCounterWithBackend

from degmix_kernels import deform_conv2d
from degmix_kernels.testing import assert_close

# Two taps each, to be quick in the interpreter.
CALLS = {
    "general": Call(2, 16, 4, (4, 5), (1, 2), padding=(0, 1)),
    "per-channel": PATHS["per-channel"],
    "between": replace(PATHS["between"], kernel=(2, 1)),
}
every_path = pytest.mark.parametrize("path", CALLS)


@every_path
def test_compiles_once_for_every_size(path: str, device: torch.device) -> None:
    """One graph, without breaks, for batch, height and width; its values and gradients are the eager ones."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(deform_conv2d, fullgraph=True, backend=counter)
    for batch, size in ((2, (4, 5)), (3, (6, 4))):
        call = replace(CALLS[path], batch=batch, size=size)
        tensors = {name: value.to(device) for name, value in call.tensors().items()}
        leaves = leaves_of(tensors)
        for name in ("input", "offset", "mask"):
            for axis in (0, 2, 3):
                torch._dynamo.mark_dynamic(leaves[name], axis)
        with forced_triton(), recorded_launches() as launches:
            output = compiled(**leaves, **call.geometry)
            actual = gradients(output, list(leaves.values()), torch.ones_like(output))
        assert kernels_of(launches) == expected_kernels(call)
        eager = leaves_of(tensors)
        with forced_triton():
            expected = deform_conv2d(**eager, **call.geometry)
            others = gradients(expected, list(eager.values()), torch.ones_like(expected))
        for mine, other in zip([output, *actual], [expected, *others], strict=True):
            assert_close(mine, other.double(), call.reduction)
    assert counter.frame_count == 1
