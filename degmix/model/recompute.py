"""Memory for arithmetic: tensors that the backward pass computes again instead of finding them saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from degmix_kernels import backend, use_backend


def checkpointed(function: Callable[..., Any], *arguments: Any, parameters: Sequence[Tensor] = ()) -> Any:
    """Call a deterministic function of which autograd keeps the arguments alone.

    Args:
        function: what is called, in the backward pass once more, on the same backend.
        arguments: its arguments.
        parameters: tensors that it uses besides.

    Raises:
        RuntimeError: in the backward pass, if a tensor among them has been changed in place since.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    if torch.compiler.is_compiling():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    used = [each for each in (*arguments, *parameters) if isinstance(each, Tensor)]
    name, unchanged = backend.chosen(), [version_check(tensor) for tensor in used]

    def call(*arguments: Any) -> Any:
        for check in unchanged:
            check()
        with use_backend(name):
            return function(*arguments)

    return checkpoint(call, *arguments, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def recomputed(computes: Sequence[tuple[Tensor, Callable[..., Tensor], Sequence[Tensor]]]) -> Iterator[None]:
    """Where autograd, inside, would save one of the given tensors, it keeps only what computes it again.

    Compilers decide themselves what to compute twice; for them this changes nothing. What an activation
    checkpoint around it, or another of PyTorch's hooks, does with saved tensors, it does with what is kept.

    Args:
        computes: tensors that some operation inside saves; each with a function that gives the same values
            in the same shape, and the function's arguments. It runs in the backward pass, without autograd,
            under the forward pass's autocast and on its backend.

    Raises:
        RuntimeError: in the backward pass, if a tensor that is kept has been changed in place since.
    """
    if torch.compiler.is_compiling() or not any(tensor.requires_grad for tensor, *_ in computes):
        yield
        return
    found = {_place(tensor): (function, arguments) for tensor, function, arguments in computes}
    # PyTorch calls the innermost hooks only: these have to call those around them.
    around = torch._C._autograd._top_saved_tensors_default_hooks(False)
    device, name = computes[0][0].device.type, backend.chosen()
    autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}

    def keep(tensor: Tensor) -> Callable[[], Tensor]:
        # An operation that keeps its own result would keep itself alive by it, but for detach.
        tensor = tensor.detach()
        return version_check(tensor) if around is None else partial(around[1], around[0](tensor))

    def again(function: Callable[..., Tensor], arguments: list[Callable[[], Tensor]]) -> Tensor:
        with torch.no_grad(), torch.autocast(device, **autocast), use_backend(name):
            return function(*(get() for get in arguments))

    def pack(saved: Tensor) -> Callable[[], Tensor]:
        if (known := found.get(_place(saved))) is None:
            return keep(saved)
        return partial(again, known[0], [keep(each) for each in known[1]])

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda get: get()):
        yield


def version_check(tensor: Tensor) -> Callable[[], Tensor]:
    """A function that gives the tensor, and raises if it has been changed in place by then."""
    if tensor.is_inference():  # these have no version, and autograd does not let them be saved
        return lambda: tensor
    version = tensor._version

    def get() -> Tensor:
        if tensor._version != version:
            shape = tuple(tensor.shape)
            raise RuntimeError(
                f"a tensor of shape {shape} was changed in place between forward and backward pass"
            )
        return tensor

    return get


def _place(tensor: Tensor) -> tuple[int, int, torch.Size]:
    """Which part of which memory a tensor is."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape
