"""Every kernel of the registry compiles for every supported GPU, without spilling: no GPU needed."""

from __future__ import annotations

import warnings

import pytest

from bench.compiler.compiled import Compiled, faults
from bench.compiler.resources import (
    BASELINE,
    UPDATE,
    compile_for,
    differences,
    may_spill,
    read_baseline,
    spilling,
)
from bench.compiler.targets import TARGETS


@pytest.mark.timeout(1800)  # some hundred kernels, with empty caches on a busy machine
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target: str, request: pytest.FixtureRequest) -> None:
    """All that is asked of a target, in one test: kernels compile once, whichever worker takes it.

    One launch of each kernel is compiled, on each target in another dtype; all of them with --full. The
    baseline knows all.
    """
    full = request.config.getoption("--full")
    try:
        rows, keys = compile_for(target, representatives=not full)
    except RuntimeError as error:
        if "ROCm linker" not in str(error):
            raise
        pytest.skip("this Triton's package has no linker for AMD's GPUs, and ROCm's is not there")
    assert {dtype for _, _, dtype, *_ in keys} == {"fp32", "bf16", "fp16"}
    assert any("INDEX_64" in configuration for _, _, _, configuration, *_ in keys)
    assert not [(row.key, fault) for row in rows for fault in faults(row)]
    if spilled := spilling(rows):
        assert may_spill(BASELINE), spilled
        warnings.warn(f"with this Triton {len(spilled)} launches spill: {spilled}", stacklevel=1)
    changed = differences(target, rows, read_baseline(BASELINE), keys)
    assert not changed, f"if this is meant, run {UPDATE}:\n" + "\n".join(changed)
    if target == "sm_90":
        aligned = [row for row in rows if "(general)" in row.op and row.sizes["segment"] % 32 == 0]
        if full:
            assert {row.kernel for row in aligned} == {"forward", "backward_samples", "backward_weight"}
        for row in aligned:
            check_general_widths(row)
        aligned = [row for row in rows if row.op == "batch_norm" and row.constants.get("UNIT") == 16]
        if full:
            assert {(row.kernel, row.constants["LAST"]) for row in aligned} == {
                (kernel, last) for kernel in ("forward", "backward") for last in (False, True)
            }
        for row in aligned:  # the vectors are fp32
            assert row.loads.get("128", 0) > 0, row
            assert "16" not in row.loads, row
        # More key tasks than these, and the backward pass keeps half as much of each.
        aligned = [
            row
            for row in rows
            if row.op == "task_attention" and row.dtype != "fp32"
            if row.constants["HEAD_DIM"] % 8 == 0 and row.constants["TASKS"] <= 5
        ]
        if full:
            assert {(row.kernel, row.constants["HEAD_DIM"]) for row in aligned} >= {
                (kernel, head_dim) for kernel in ("forward", "backward") for head_dim in (40, 128, 256)
            }
        for row in aligned:
            assert set(row.loads) == {"128"}, row


def check_general_widths(row: Compiled) -> None:
    """Each corner of a sample is one wide load per thread, each part of the input gradient one reduction.

    The other, narrow loads are those of offset (two), mask, bias and the fixed point's scale.
    """
    loads = {int(bits): count for bits, count in row.loads.items()}
    if row.kernel == "backward_samples":  # smaller tiles, so that two programs fit a multiprocessor
        assert loads.get(64, 0) + loads.get(128, 0) >= 4, row
        width = 64 if row.constants["FIXED_POINT"] else 128  # 64-bit integers have no wider reduction
        assert set(row.reductions) == {str(width)}, row
    else:
        assert loads.get(128, 0) >= 4, row
        assert loads.get(16, 0) <= 2, row
