"""The modules around ``gated_attention`` and ``linear_attention``: projections and heads."""

from __future__ import annotations

from torch import Tensor, nn

from degmix_kernels.attention.linear_op import linear_attention
from degmix_kernels.attention.op import gated_attention
from degmix_kernels.task_attention.module import TaskAttention, check_sizes, check_tokens


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, C) → (B, heads, N, C/heads)."""
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def join_heads(tokens: Tensor) -> Tensor:
    """(B, heads, N, C/heads) → (B, N, C)."""
    return tokens.transpose(1, 2).flatten(2)


class GatedAttention(TaskAttention):
    """Multi-head softmax attention over all tokens, with an optional gate on the attended values.

    Parameters, their names and their initialisation are those of :class:`degmix_kernels.TaskAttention` and
    ``nn.MultiheadAttention``, so one loads into the other.

    Args:
        dim: channels of the tokens.
        heads: number of heads; divides ``dim``.

    Raises:
        TypeError: for a size that is no integer.
        ValueError: for a size below 1, or heads that do not divide ``dim``.
    """

    def forward(self, query: Tensor, context: Tensor, gate: Tensor | None = None) -> Tensor:
        """(B, N, C) queries attend to all of (B, M, C) ``context``; ``gate`` and result are (B, N, C)."""
        check_tokens(3, query=query, context=context, gate=query if gate is None else gate)
        projections = self.project_query(query), *self.project_context(context)
        parts = [split_heads(each, self.heads) for each in projections]
        attended = gated_attention(*parts, None if gate is None else split_heads(gate, self.heads))
        return self.out_proj(join_heads(attended))


class LinearAttention(nn.Module):
    """Multi-head attention without softmax over all tokens: LayerNorms, bias-free q, k, v, output projection.

    The scale is ``(dim/heads)^-½``. Linear layers and LayerNorms keep PyTorch's default initialisation.

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
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(dim) for _ in range(3))
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """(B, N, C) queries, (B, M, C) tokens of ``context`` → (B, N, C)."""
        check_tokens(3, query=query, context=context)
        attended = linear_attention(
            split_heads(self.to_q(self.norm_q(query)), self.heads),
            split_heads(self.to_k(self.norm_k(context)), self.heads),
            split_heads(self.to_v(self.norm_v(context)), self.heads),
            self.scale,
        )
        return self.proj(join_heads(attended))
