"""What a plan hands to Triton, and what it asks PyTorch."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from degmix_kernels import launch
from degmix_kernels.launch import Launch
from degmix_kernels.product import allows_tf32


class Kernel:
    """Stands for a ``@triton.jit`` function, and keeps the options that it is launched with."""

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda **given: self.given.append(given)

    def __init__(self) -> None:
        self.given: list[dict] = []


@pytest.mark.parametrize(
    ("capability", "hip", "limit", "expected"),
    [
        ((9, 0), None, 128, {"maxnreg": 128}),
        ((9, 0), None, None, {}),
        ((8, 0), None, 128, {}),
        ((10, 0), None, 128, {}),
        ((9, 0), "6.4", 128, {}),  # AMD's gfx90a says 9, 0, too, and its compiler has no such option
    ],
)
def test_registers_are_limited_on_hopper_alone(monkeypatch, capability, hip, limit, expected):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_capability", lambda index: capability)
    kernel = Kernel()
    launch._launch(Launch(kernel, 3, {"size": 5}, {"BLOCK": 8}, 2, 1, limit))
    assert kernel.given == [{"size": 5, "BLOCK": 8, "num_warps": 2, "num_stages": 1, **expected}]


def test_a_test_that_pretends_to_be_on_amd_leaves_nothing(monkeypatch):
    """Kernels of the tests after it had no limit: it was remembered that this is no Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_capability", cache(lambda index: (9, 0)))
    with monkeypatch.context() as pretending:
        pretending.setattr(torch.version, "hip", "made up")
        assert not launch._on_hopper()
    monkeypatch.setattr(torch.version, "hip", None)
    assert launch._on_hopper()


def test_a_grid_has_an_end():
    kernel = Kernel()
    with pytest.raises(ValueError, match="grid: expected at most 2147483647 programs, got 2147483648"):
        launch.run(Launch(kernel, 2**31, {}, {}), torch.device("cpu"))
    assert kernel.given == []


@pytest.mark.parametrize("current", [0, 1])
def test_a_launch_runs_on_the_device_of_its_tensors(monkeypatch, current):
    devices = [current]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            devices.append(self.index)

        def __exit__(self, *_: object) -> None:
            devices.pop()

    launched_on = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(launch, "_launch", lambda planned: launched_on.append(devices[-1]))
    launch.run(Launch(Kernel(), 1, {}, {}), torch.device("cuda", 1))
    assert launched_on == [1]
    assert devices == [current]


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch has only the older setting"
)
def test_either_setting_allows_tf32():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    assert not allows_tf32()
    try:
        for setting, allowed, forbidden in (("allow_tf32", True, False), ("fp32_precision", "tf32", "ieee")):
            setattr(matmul, setting, allowed)
            assert allows_tf32()
            setattr(matmul, setting, forbidden)
            assert not allows_tf32()
    finally:
        matmul.fp32_precision = before
