"""Autocast, one rule for every op: what is cast, and that nothing is cast again inside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def enabled(device: torch.device) -> bool:
    """Whether autocast is on for the device; never for meta tensors, of which PyTorch refuses to tell."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def cast_inputs(device: torch.device, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast half and single precision tensors to the autocast dtype if autocast is on for the device.

    Doubles, integers and None pass through, as does everything outside an autocast region.
    """
    if not enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def widen_other_half(tensor: Tensor, like: Tensor) -> Tensor:
    """Under autocast, a half-precision tensor of the other half dtype than ``like``'s as fp32.

    For tensors that keep their own dtype, coordinates for example: autocast may have cast the rest.
    """
    other = tensor.dtype in (torch.float16, torch.bfloat16) and tensor.dtype != like.dtype
    return tensor.float() if other and enabled(tensor.device) else tensor


def disabled(device: torch.device) -> AbstractContextManager[object]:
    """A region in which autocast leaves the op's own arithmetic alone; references run inside it."""
    if enabled(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
