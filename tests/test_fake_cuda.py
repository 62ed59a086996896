"""The fake GPU refuses what a GPU refuses, and lets a step of training pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest
import torch
from torch import nn

here = torch.ones(3)

def test_devices():
    assert torch.device("cuda").type == "cuda"
    assert torch.ones(3, device=torch.device("cuda")).is_cuda

def test_a_step(tmp_path):
    model = nn.Linear(3, 2).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.autocast("cuda", torch.bfloat16):
        result = model(here.to("cuda"))
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert result.is_cuda
    assert model.weight.grad.device.type == "cuda"
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt", map_location="cpu")["weight"].device.type == "cpu"
    assert result.detach().float().cpu().numpy().shape == (2,)

@pytest.mark.parametrize(
    "mix",
    [
        lambda there: here + there,
        lambda there: there.add_(here),
        lambda there: torch.cat([there, here]),
        lambda there: nn.Linear(3, 2)(there),
        lambda there: there.to(here) + there,
        lambda there: torch.ones_like(there) * here,
    ],
)
def test_two_devices(mix):
    with pytest.raises(RuntimeError, match="all tensors on cuda:0"):
        mix(torch.ones(3, device="cuda"))

def test_numpy():
    with pytest.raises(TypeError, match="numpy"):
        here.cuda().numpy()
"""


def test_fake_cuda(tmp_path: Path) -> None:
    (tmp_path / "test_devices.py").write_text(TESTS, encoding="utf-8")
    options = ("-p", "fake_cuda", "-p", "no:cacheprovider", "-p", "no:xdist")
    tests = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_devices.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "9 passed" in process.stdout
