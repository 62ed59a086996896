"""Tensors of several modules as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gathered(kinds: Sequence[Sequence[Tensor]], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Put tensors of the same shape behind each other, all of them in a single copy.

    Args:
        kinds: lists of tensors of one shape each; all of one dtype.
        dtype: of the result; theirs if None.

    Returns:
        One tensor per list, (tensors of the list, *their shape). Gradients flow back in a single copy, too.
    """
    flat = torch.cat([tensor.reshape(-1) for kind in kinds for tensor in kind])
    if dtype is not None:
        flat = flat.to(dtype)
    parts = flat.split([len(kind) * kind[0].numel() for kind in kinds])
    return [part.view(len(kind), *kind[0].shape) for part, kind in zip(parts, kinds, strict=True)]
