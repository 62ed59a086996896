"""Ceilings from made-up times: what is counted, and which of them bounds a call."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from bench.harness import ceilings
from bench.harness.measure import Timing
from bench.harness.results import Ceilings
from degmix_kernels.contract import Work


def test_bytes_are_read_and_written_and_products_are_two_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda call, timer, *seconds: Timing(2.0, 2.0, 2.0, 10))
    found = ceilings.measure_ceilings(torch.device("cpu"), ("fp32", "bf16"))
    assert found.copy == 2 * ceilings.COPY_BYTES["cpu"] / 2e-3
    assert found.matrix == dict.fromkeys(("fp32", "bf16"), 2 * ceilings.PRODUCT_SIZE["cpu"] ** 3 / 2e-3)


def test_the_buffer_is_drawn_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's default would be eight times as large for a while."""
    drawing = Mock(side_effect=torch.randint)
    monkeypatch.setattr(torch, "randint", drawing)
    ceilings.measure_ceilings(torch.device("cpu"), ())
    assert [call.kwargs["dtype"] for call in drawing.mock_calls] == [torch.uint8]


@pytest.mark.parametrize(
    ("rate", "seconds"), [(7e14, 3), (2e13, 3), (1e11, 37)], ids=["large", "small", "tiny"]
)
def test_a_gpu_is_kept_at_work_as_long_as_its_rate_says(rate: float, seconds: float) -> None:
    products = ceilings.products_at_work(rate)
    assert products == int(products) >= 1
    assert 2 * ceilings.SIZE_AT_WORK**3 * products / rate == pytest.approx(seconds, rel=0.05)


def test_the_slower_of_the_two_bounds() -> None:
    known = Ceilings(1e9, {"fp32": 1e10})
    assert ceilings.speed_of_light(Work(10**6, 10**6), 2.0, known, "fp32") == pytest.approx(0.5)
    assert ceilings.speed_of_light(Work(10**6, 4 * 10**7), 8.0, known, "fp32") == pytest.approx(0.5)
    assert ceilings.speed_of_light(Work(1, 1), 1.0, known, "bf16") is None
    assert ceilings.speed_of_light(Work(1, 1), 1.0, Ceilings(None, {"fp32": 1.0}), "fp32") is None
