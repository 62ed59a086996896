"""``deform_conv2d`` inside compilers, on each path; batch sizes alone are for test_contract.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from contract import leaves_of, result_and_gradients
from deform_conv_cases import PATHS, Call, expected_kernels, forced_triton, kernels_of
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
            actual = result_and_gradients(partial(compiled, **call.geometry), leaves)
        assert kernels_of(launches) == expected_kernels(call)
        with forced_triton():
            expected = result_and_gradients(partial(deform_conv2d, **call.geometry), leaves_of(tensors))
        for name, value in actual.items():
            assert_close(value, expected[name].double(), call.reduction, name=name)
    assert counter.frame_count == 1
