"""The profile of a step of training: the head's, and a table that can be pasted."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench import profile_step
from bench.cases.model import FORMULA, HEAD
from bench.cases.shapes import QUICK
from bench.gpu import small_calls
from bench.harness.case import Case
from bench.harness.machine import read_machine
from bench.harness.results import OURS
from bench.profile_step import LARGEST, LONGEST_NAME, SHAPE, Kernel, kernels, step_case, table

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", [OURS, FORMULA])
def test_a_step_on_a_cpu(name: str, torchvision: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_step, "WARM_UP", 1)
    monkeypatch.setattr(profile_step, "STEPS", 2)
    wall, found = profile_step.profile_step(step_case(QUICK), name, CPU, "fp32")
    assert all(kernel.ms > 0 and kernel.calls > 0 for kernel in found)
    assert [kernel.ms for kernel in found] == sorted((kernel.ms for kernel in found), reverse=True)
    assert sum(kernel.ms for kernel in found) < 1.1 * wall
    names = [kernel.name for kernel in found]
    assert any("convolution" in name for name in names)
    assert any("backward" in name.lower() for name in names)
    rows = [cells(line) for line in table(name, wall, found).splitlines() if line.startswith("|")][2:]
    assert len(rows) == LARGEST + 1
    assert sum(float(share.rstrip("%")) for _, share, _, _ in rows) == pytest.approx(100, abs=1)


def average(key: str, device_type: DeviceType, microseconds: float, note: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        key=key,
        count=10,
        device_type=device_type,
        self_device_time_total=microseconds,
        self_cpu_time_total=1.0,
        is_user_annotation=note,
    )


def test_kernels_are_not_counted_again_with_what_launched_them() -> None:
    averages = [
        average("aten::mm", DeviceType.CPU, 5000),
        average("small", DeviceType.CUDA, 1000),
        average("a step", DeviceType.CUDA, 9000, note=True),
        average("gemm", DeviceType.CUDA, 5000),
        average("nothing", DeviceType.CUDA, 0),
    ]
    assert kernels(averages, CUDA) == [Kernel("gemm", 2, 1.0), Kernel("small", 2, 0.2)]


def test_the_table_is_markdown() -> None:
    found = [Kernel(f"void a<b|c>\n{'x' * 99}", 2, 3.0), *(Kernel(f"k{i}", 1, 0.1) for i in range(20))]
    lines = table("ours", 10.0, found).splitlines()
    assert lines[0] == "**ours**: 10.00 ms a step under the profiler, of which the device works 50%; 22 calls"
    assert lines[2:4] == ["| kernel | share | calls | ms |", "|---|---:|---:|---:|"]
    rows = [cells(line) for line in lines[4:]]
    assert {len(row) for row in rows} == {4}
    assert rows[0] == [f"`void a<b/c> {'x' * (LONGEST_NAME - 13)}…`", "60.0%", "2", "3.000"]
    assert rows[-1] == ["6 others", "12.0%", "6", "0.600"]
    assert len(rows) == LARGEST + 1


@pytest.mark.parametrize("program", [profile_step, small_calls])
def test_options_are_read_before_a_gpu_is_asked_for(
    program: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    assert f"usage: python -m {program.__name__}" in capsys.readouterr().out
    assert program.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_a_file_has_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that is made up. The head is profiled at the data set's size; a failure leaves no file."""
    names: list[str] = []

    def profile(case: Case, name: str, device: torch.device, dtype: str) -> tuple[float, list[Kernel]]:
        assert (case.op, case.images) == (HEAD, 8)
        assert dtype in case.dtypes
        names.append(name)
        if len(names) > 4:
            raise RuntimeError("out of luck")
        return 2.0, [Kernel("gemm", 1, 1.0)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(profile_step, "read_machine", lambda device: read_machine(CPU))
    monkeypatch.setattr(profile_step, "profile_step", profile)
    assert profile_step.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{HEAD}, {SHAPE}, ")
    file = tmp_path / "gpu" / "profile.md"
    assert profile_step.main(["--out", str(file)]) == 0
    assert names == 2 * [OURS, FORMULA]
    assert file.read_text().rstrip() == printed.rstrip()
    assert capsys.readouterr().out == ""
    assert profile_step.main(["--out", str(tmp_path)]) == 2
    assert "expected a file, got a folder" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="out of luck"):
        profile_step.main(["--out", str(tmp_path / "failed.md")])
    assert [path.name for path in tmp_path.iterdir()] == ["gpu"]
