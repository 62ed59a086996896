"""Every op against fp64: on a CPU with Triton's interpreter instead of a GPU, for one op."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.gpu import check_ops
from degmix_kernels import registry

OP = registry.find("coordinate_bias")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is made up: tensors are on the CPU."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "device", lambda *_: cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("gpu")
def test_every_dtype_and_sample_is_checked() -> None:
    lines: list[dict] = []
    check_ops.check_op(OP, lines.append)
    assert {line["dtype"] for line in lines} == {"fp32", "bf16", "fp16"}
    samples = OP.samples(torch.ones(()).device, torch.float32, torch.Generator())
    assert len(lines) == 3 * len(samples)
    assert all(line["ok"] and 0 <= line["error"] <= line["tolerance"] for line in lines)
    assert any(line["worst"].startswith("gradient of ") for line in lines)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fault", ["value", "nan", "gradient", "raises"])
def test_what_is_wrong_is_found(fault: str) -> None:
    def wrong(**arguments: object) -> torch.Tensor:
        output = OP.function(**arguments)
        if fault == "raises":
            raise ValueError("a reason\nof two lines")
        if fault == "gradient":
            return output.detach() + 2 * (output - output.detach())
        return output * (float("nan") if fault == "nan" else 1.1)

    lines: list[dict] = []
    check_ops.check_op(replace(OP, function=wrong), lines.append)
    bad = [line for line in lines if not line["ok"]]
    assert len(bad) >= len(lines) - 3  # of each dtype one that is empty
    if fault == "raises":
        assert bad[0]["failed"] == "ValueError: a reason of two lines"
    else:
        assert bad[0]["worst"].startswith("gradient" if fault == "gradient" else "")
        json.dumps(bad)


@pytest.mark.usefixtures("gpu")
def test_a_lost_gpu_ends_an_op_behind_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    lines: list[dict] = []
    with pytest.raises(RuntimeError, match="illegal memory access"):
        check_ops.check_op(OP, lines.append)
    assert len(lines) == 1
    assert "illegal memory access" in lines[0]["failed"]


CHILD = """
import json, os, sys, time
part, label = sys.argv[-3], sys.argv[-1]
right = {"op": label, "dtype": "fp32", "sample": 0, "ok": True, "seconds": 0.0}
open(part, "w").write(json.dumps(right) + "\\n")
if label == "deform_mix":
    os.kill(os.getpid(), 11)
if label == "batch_norm":
    time.sleep(60)
"""


def test_a_process_that_dies_or_hangs_costs_its_own_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "python"
    child.write_text(f"#!{sys.executable}\n{CHILD}")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    lines, notes = check_ops.check_all(tmp_path / "out.jsonl", seconds=5, processes=4)
    assert {line["op"] for line in lines} == {op.label for op in registry.OPS}
    assert sorted(note.partition(":")[0] for note in notes) == ["batch_norm", "deform_mix"]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(registry.OPS)


@pytest.mark.parametrize(
    ("right", "code"), [(10, 0), (6, 1), (4, check_ops.MOST_ARE_WRONG), (0, check_ops.MOST_ARE_WRONG)]
)
def test_exit_codes(
    right: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = {"op": "an op", "dtype": "fp32", "sample": 0, "worst": "output", "error": 1.0, "tolerance": 0.1}
    lines = [line | {"ok": index < right} for index in range(10)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check_ops, "check_all", lambda *_: (lines, []))
    assert check_ops.main([str(tmp_path / "checks.jsonl")]) == code
    assert f"{right} of 10 checks right, 1 ops" in capsys.readouterr().out
