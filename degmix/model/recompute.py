"""Memory for arithmetic: tensors that the backward pass computes again instead of finding them saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def checkpointed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a deterministic function of which autograd keeps the arguments alone."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def recomputed(
    computes: Sequence[tuple[Tensor, Callable[[], Tensor]]], parameters: Sequence[Tensor]
) -> Iterator[None]:
    """Where autograd, inside, would save one of the given tensors, it keeps only what computes it again.

    Compilers decide themselves what to compute twice; for them this changes nothing.

    Args:
        computes: tensors that some operation inside saves, each with what gives the same values, of the same
            shape; runs in the backward pass, without autograd and under the forward pass's autocast.
        parameters: what these read and others may change in place.

    Raises:
        RuntimeError: in the backward pass, if one of the parameters has been changed since.
    """
    if torch.compiler.is_compiling() or not any(tensor.requires_grad for tensor, _ in computes):
        yield
        return
    kept = {_place(tensor): compute for tensor, compute in computes}
    versions = [parameter._version for parameter in parameters]
    device = computes[0][0].device.type
    autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}

    def pack(saved: Tensor) -> Any:
        # An operation that keeps its own result would keep itself alive by it, but for detach.
        return kept.get(_place(saved)) or saved.detach()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if versions != [parameter._version for parameter in parameters]:
            raise RuntimeError("a parameter was changed in place between forward and backward pass")
        with torch.no_grad(), torch.autocast(device, **autocast):
            return packed()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _place(tensor: Tensor) -> tuple[int, int, torch.Size]:
    """Which part of which memory a tensor is."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape
