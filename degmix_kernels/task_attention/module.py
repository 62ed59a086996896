"""The module around ``task_attention``: projections of query, key, value and output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from degmix_kernels import checks
from degmix_kernels.task_attention.op import check_heads, task_attention


def check_sizes(dim: int, heads: int) -> None:
    """Raise unless these are positive integers, of which the second divides the first."""
    checks.expect_integer("dim", dim, 1)
    checks.expect_integer("heads", heads, 1)
    check_heads(heads, dim)


def check_tokens(dims: int, **tensors: Tensor) -> None:
    """Raise unless these are tensors of so many dimensions."""
    for name, tokens in tensors.items():
        checks.expect_tensor(name, tokens)
        checks.expect_dims(name, tokens, dims)


class TaskAttention(nn.Module):
    """Multi-head attention over tasks at each pixel, with the parameters of ``nn.MultiheadAttention``.

    ``in_proj_weight`` (3·dim, dim) and ``in_proj_bias`` (3·dim,) stack query, key and value; ``out_proj`` is
    a Linear. The initialisation is that of ``nn.MultiheadAttention``: Xavier-uniform projections, zero
    biases, a default ``out_proj.weight``.

    Args:
        dim: channels of the tokens.
        heads: number of heads; divides ``dim``.

    Raises:
        TypeError: for a size that is no integer.
        ValueError: for a size below 1, or heads that do not divide ``dim``.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        check_sizes(dim, heads)
        self.dim = dim
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        self.out_proj.reset_parameters()
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """(B, S, N, C) queries attend to the (B, T, N, C) ``context`` at their pixel → (B, S, N, C)."""
        check_tokens(4, query=query, context=context)
        projected = task_attention(self.project_query(query), *self.project_context(context), self.heads)
        return self.out_proj(projected)

    def project_query(self, query: Tensor) -> Tensor:
        """``W_q x + b_q``, any leading shape."""
        return functional.linear(query, self.in_proj_weight[: self.dim], self.in_proj_bias[: self.dim])

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """``W_k x + b_k`` and ``W_v x + b_v``, any leading shape."""
        weight, bias = self.in_proj_weight[self.dim :], self.in_proj_bias[self.dim :]
        return functional.linear(context, weight, bias).chunk(2, dim=-1)

    def project_value(self, context: Tensor) -> Tensor:
        """``W_v x + b_v`` alone, any leading shape."""
        weight, bias = self.in_proj_weight[2 * self.dim :], self.in_proj_bias[2 * self.dim :]
        return functional.linear(context, weight, bias)

    def extra_repr(self) -> str:
        """Constructor arguments."""
        return f"{self.dim}, heads={self.heads}"
