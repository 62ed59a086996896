"""The activations an op can end with."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

ACTIVATIONS = {
    "gelu": functional.gelu,  # exact: x Φ(x) with the error function
    "relu": functional.relu,
    "silu": functional.silu,
    "identity": lambda x: x,
}


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply one of ``ACTIVATIONS`` by name."""
    return ACTIVATIONS[activation](x)
