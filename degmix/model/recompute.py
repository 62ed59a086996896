"""Memory for arithmetic: tensors that the backward pass computes again instead of finding them saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def recomputed(tensor: Tensor, compute: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Iterator[None]:
    """Where autograd, inside, would save ``tensor``, it keeps only what computes it again.

    Compilers decide themselves what to compute twice; for them this changes nothing.

    Args:
        tensor: a result that some operation inside saves.
        compute: gives the same values; runs in the backward pass, without autograd.
        parameters: what ``compute`` reads and others may change in place.

    Raises:
        RuntimeError: in the backward pass, if one of the parameters has been changed since.
    """
    if torch.compiler.is_compiling() or not tensor.requires_grad:
        yield
        return
    storage, shape = tensor.untyped_storage()._cdata, tensor.shape
    versions = [parameter._version for parameter in parameters]

    def pack(saved: Tensor) -> Any:
        same = saved.untyped_storage()._cdata == storage and saved.shape == shape
        return compute if same else saved

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if versions != [parameter._version for parameter in parameters]:
            raise RuntimeError("a parameter was changed in place between forward and backward pass")
        with torch.no_grad():
            return kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
