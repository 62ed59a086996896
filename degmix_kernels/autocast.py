"""Autocast, one rule for every op: what is cast, and that nothing is cast again inside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def enabled(device: torch.device) -> bool:
    """Whether autocast is on for the device; never for meta tensors, of which PyTorch refuses to tell."""
    kind = device.type  # PyTorch makes a new string each time
    return kind != "meta" and torch.is_autocast_enabled(kind)


def cast(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A half or single precision tensor in the device's autocast dtype; doubles and None as they are."""
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device.type))


def widen_other_half(tensor: Tensor, like: Tensor) -> Tensor:
    """A half-precision tensor of another half dtype than ``like``'s as fp32.

    For coordinates, which keep their dtype under autocast: the rest may have been cast.
    """
    other = tensor.dtype in (torch.float16, torch.bfloat16) and tensor.dtype != like.dtype
    return tensor.float() if other else tensor


def disabled(device: torch.device) -> AbstractContextManager[object]:
    """A region in which autocast leaves the op's own arithmetic alone; references run inside it."""
    if enabled(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
