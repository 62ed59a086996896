"""One op, two entrances: a registered op for compilers, a plain autograd function for eager calls.

The dispatcher costs an eager call several times what autograd itself costs, and brings nothing there. So
eager calls go straight to an ``autograd.Function``; ``torch.compile`` and ``torch.export`` see the registered
op. Both share forward, backward and everything saved in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

Output = Tensor | tuple[Tensor, ...]


class RegisteredOp:
    """A differentiable op, callable with positional arguments.

    Args:
        name: ``"namespace::name"``; the backward op is registered as ``name + "_backward"``.
        forward: computes the output, a tensor or a tuple of tensors; annotated, as
            ``torch.library.custom_op`` reads its schema from it.
        fake_forward: an empty output for traced inputs.
        setup_context: ``setup_context(ctx, inputs, output)`` saves what the backward pass needs.
        backward: computes gradients; annotated, returns a list of tensors, empty ones where not wanted.
        fake_backward: empty gradients for traced inputs.
        differentiate: ``differentiate(ctx, backward, *grads)``, with one gradient (or None) per output, calls
            ``backward`` and sorts its results into one gradient or None per forward argument.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Output],
        fake_forward: Callable[..., Output],
        setup_context: Callable[[Any, tuple[Any, ...], Any], None],
        backward: Callable[..., list[Tensor]],
        fake_backward: Callable[..., list[Tensor]],
        differentiate: Callable[..., tuple[Tensor | None, ...]],
    ) -> None:
        def refuse(ctx: FunctionCtx, *grads: Tensor) -> None:
            raise RuntimeError(
                f"{name}: the Triton kernels have no second derivative; "
                'run this call under use_backend("reference")'
            )

        self.backward = torch.library.custom_op(f"{name}_backward", backward, mutates_args=())
        self.backward.register_fake(fake_backward)
        self.backward.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)

        self.forward = torch.library.custom_op(name, forward, mutates_args=())
        self.forward.register_fake(fake_forward)
        self.forward.register_autograd(
            lambda ctx, *grads: differentiate(ctx, self.backward, *grads), setup_context=setup_context
        )

        class Refusing(torch.autograd.Function):
            """The backward pass inside a graph that somebody builds of it (``create_graph=True``)."""

            @staticmethod
            def forward(ctx: FunctionCtx, *arguments: Any) -> tuple[Tensor, ...]:
                return tuple(backward(*arguments))

        Refusing.backward = staticmethod(refuse)

        class Eager(torch.autograd.Function):
            """The op outside of compilers."""

            # Not split into forward and setup_context, as PyTorch would allow: for such functions it looks
            # up the signature of forward in every call.
            @staticmethod
            def forward(ctx: FunctionCtx, *arguments: Any) -> Output:
                output = forward(*arguments)
                setup_context(ctx, arguments, output)
                return output

            @staticmethod
            def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                return differentiate(ctx, Refusing.apply if torch.is_grad_enabled() else backward, *grads)

        self._eager = Eager.apply

    def __call__(self, *arguments: Any) -> Any:
        """Run the op on the entrance that fits the caller."""
        if torch.compiler.is_compiling():
            return self.forward(*arguments)
        return self._eager(*arguments)
