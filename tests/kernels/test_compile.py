"""Every kernel of the registry compiles for every supported GPU, without spilling: no GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
KILOBYTE = 1024
# target → shared memory one program may use, in bytes
SHARED = {
    ("cuda", "80"): 163 * KILOBYTE,
    ("cuda", "90"): 227 * KILOBYTE,
    ("cuda", "100"): 227 * KILOBYTE,
    ("hip", "gfx942"): 64 * KILOBYTE,
}


@pytest.mark.parametrize("target", SHARED, ids="-".join)
def test_compiles_without_spills(target: tuple[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    result = subprocess.run(
        [sys.executable, SCRIPT, *target], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["dtype"] for line in lines} == {"float32", "bfloat16", "float16"}
    assert any(line["constants"]["INDEX_64"] for line in lines)
    assert not [line for line in lines if line["spilled"] or line["shared"] > SHARED[target]]
    for line in lines:
        # Half precision products run on the matrix units, by the instructions of the target's own generation.
        # Those have no use for 16 out channels or, on Blackwell, 16 warps, which the planar kernels need:
        # bytes, not products, are what these wait for.
        matrix = line["matrix"] or ("(general)" not in line["op"] and line["older_matrix"])
        assert matrix or not line["products"] or line["dtype"] == "float32", line
    if target == ("cuda", "90"):
        aligned = [line for line in lines if "(general)" in line["op"] and line["sizes"]["segment"] % 32 == 0]
        assert {line["kernel"] for line in aligned} == {"forward", "backward_samples", "backward_weight"}
        for line in aligned:
            check_general_widths(line)
        aligned = [
            line for line in lines if line["op"] == "batch_norm" and line["constants"].get("UNIT") == 16
        ]
        assert {(line["kernel"], line["constants"]["LAST"]) for line in aligned} == {
            (kernel, last) for kernel in ("forward", "backward") for last in (False, True)
        }
        for line in aligned:  # the vectors are fp32
            assert line["loads"].get("128", 0) > 0, line
            assert "16" not in line["loads"], line
        # More key tasks than these, and the backward pass keeps half as much of each.
        aligned = [
            line
            for line in lines
            if line["op"] == "task_attention" and line["dtype"] != "float32"
            if line["constants"]["HEAD_DIM"] % 8 == 0 and line["constants"]["TASKS"] <= 5
        ]
        assert {(line["kernel"], line["constants"]["HEAD_DIM"]) for line in aligned} >= {
            (kernel, head_dim) for kernel in ("forward", "backward") for head_dim in (40, 128, 256)
        }
        for line in aligned:
            assert set(line["loads"]) == {"128"}, line


def check_general_widths(line: dict) -> None:
    """Each corner of a sample is one wide load per thread, each part of the input gradient one reduction.

    The other, narrow loads are those of offset (two), mask, bias and the fixed point's scale.
    """
    loads = {int(bits): count for bits, count in line["loads"].items()}
    if line["kernel"] == "backward_samples":  # smaller tiles, so that two programs fit a multiprocessor
        assert loads.get(64, 0) + loads.get(128, 0) >= 4, line
        width = 64 if line["constants"]["FIXED_POINT"] else 128  # 64-bit integers have no wider reduction
        assert set(line["reductions"]) == {str(width)}, line
    else:
        assert loads.get(128, 0) >= 4, line
        assert loads.get(16, 0) <= 2, line
