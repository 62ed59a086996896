"""Who watches a call, and what PyTorch's tracers and transforms need to see an op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._guards import TracingContext
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI

from degmix_kernels.setting import Setting

NAMESPACE = "degmix"
TENSORS = (Tensor, torch.nn.Parameter)
_BEFORE_DISPATCH = torch._C.DispatchKey.PreDispatch
_PLAIN = {*TENSORS, type(None), int, float, bool, str, list}

_transparent = Setting("degmix_transparent", False)
transparent = _transparent.set
"""``with transparent(True):`` ops run as if no dispatch mode watched: for modes that look inside ops."""


def is_traced() -> bool:
    """Whether a graph is being made by ``torch.jit.trace`` or ``make_fx``."""
    if torch._C._get_tracing_state() is not None or _is_traced_before_dispatch():
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_watched(values: Sequence[Any]) -> bool:
    """Whether someone would miss what does not go through the dispatcher."""
    if torch._C._get_tracing_state() is not None or _is_traced_before_dispatch():
        return True
    if torch._C._len_torch_dispatch_stack() == 0 and _PLAIN.issuperset(map(type, values)):
        return False
    # A compiler looks at tensors that have no values: it never sees inside.
    return not _transparent.get() or TracingContext.try_get() is not None


def _is_traced_before_dispatch() -> bool:
    """Whether ``make_fx(…, pre_dispatch=True)`` is making a graph. Its mode has a stack of its own."""
    return torch._C._dispatch_tls_is_dispatch_key_included(_BEFORE_DISPATCH)


def is_batched(grads: Sequence[Tensor | None]) -> bool:
    """Whether a gradient is several, for ``torch.autograd.grad(…, is_grads_batched=True)``."""
    return any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    name: str,
    arguments: str,
    results: int,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    transform: Callable[..., Any],
) -> Any:
    """A registered op that transforms of ``torch.func`` find, too, whoever calls it."""
    returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    schema = f"({arguments}) -> {returns}"
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    # What torch.library registers for autograd refuses transforms, and compilers trace them through this op.
    _LIBRARY.impl(name, transform, "FuncTorchDynamicLayerFrontMode")
    return op


def transform(function: Any, below: Callable[..., Any]) -> Callable[..., Any]:
    """The call under the innermost transform of ``torch.func``; ``below`` is the call without it."""

    def innermost(*values: Any) -> Any:
        interpreter = retrieve_current_functorch_interpreter()
        if interpreter.key() != TransformType.Functionalize:
            return function.apply(*values)
        functionalize = FunctorchFunctionalizeAPI(interpreter)
        with functionalize.redispatch_to_next():
            made = below(*functionalize.unwrap_tensors(values))
        return functionalize.wrap_tensors(made)

    return innermost


def over_slices(function: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule: one call per slice."""

    def vmap(info: Any, in_dims: Sequence[Any], *values: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError("vmap: expected at least one slice, got an axis of size 0")

        def at(index: int) -> list[Any]:
            return [
                value if axis is None or not isinstance(value, Tensor) else value.select(axis, index)
                for value, axis in zip(values, in_dims, strict=True)
            ]

        slices = [function(*at(index)) for index in range(info.batch_size)]
        if isinstance(slices[0], Tensor):
            return torch.stack(slices), 0
        return tuple(torch.stack(each) for each in zip(*slices, strict=True)), (0,) * len(slices[0])

    return vmap
