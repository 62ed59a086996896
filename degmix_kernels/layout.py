"""Memory formats of 4-D tensors."""

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a 4-D tensor is channels_last, and not at the same time contiguous (as with one channel)."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def is_dense(tensor: Tensor) -> bool:
    """Whether a 4-D tensor is contiguous or channels_last."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous or channels_last, else a contiguous copy."""
    return tensor if is_dense(tensor) else tensor.contiguous()
