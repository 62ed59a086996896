"""What the kernels with matrix products have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from degmix_kernels.product import allows_tf32

MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def settings() -> Iterator[None]:
    """PyTorch's settings, as they were, afterwards."""
    before = MATMUL.fp32_precision
    yield
    MATMUL.fp32_precision = before


@pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="PyTorch has only the older setting")
@pytest.mark.usefixtures("settings")
def test_either_setting_allows_tf32() -> None:
    assert not allows_tf32()
    MATMUL.allow_tf32 = True
    assert allows_tf32()
    MATMUL.allow_tf32 = False
    assert not allows_tf32()
    for precision in ("tf32", "ieee"):
        MATMUL.fp32_precision = precision
        assert allows_tf32() == (precision == "tf32")
