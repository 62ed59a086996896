"""The task-aware gating decoder: tasks exchange what they found, query it, and gate the answer.

Every product of neighbouring projections is taken of the matrices, once per forward, where this spares
products with the tokens; the functions of the parameters are those of :mod:`degmix.model.formula`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from degmix_kernels import GatedAttention, GatedMLP, LinearAttention, TaskAttention

# Variant → attention of the query block.
QUERY_ATTENTION = {
    "released": TaskAttention,
    "pixel": TaskAttention,
    "linear": LinearAttention,
    "global": GatedAttention,
}
ATTENTIONS = tuple(QUERY_ATTENTION)


class GatingDecoder(nn.Module):
    """Interaction block, one query block per task, one gating module that all tasks share.

    Args:
        tasks: names of the T tasks, the order of axis 0.
        attention: one of ``ATTENTIONS``.
        dim: channels C of the tokens.
        heads: heads of every attention.
    """

    def __init__(self, tasks: Sequence[str], attention: str, dim: int, heads: int) -> None:
        super().__init__()
        self.per_pixel = QUERY_ATTENTION[attention] is TaskAttention
        self.interaction = TaskInteraction(attention, dim, heads)
        self.queries = nn.ModuleDict({task: TaskQuery(attention, dim, heads) for task in tasks})
        self.gate = GatedMLP(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(T, B, N, C) → (T, B, N, C)."""
        fused, queries = self.interaction(tokens), list(self.queries.values())
        if self.per_pixel:
            attended = attend_pixels(queries, tokens, fused)
        else:
            context = fused.transpose(0, 1).flatten(1, 2)  # (B, T·N, C)
            attended = [query.attend(own, context) for query, own in zip(queries, tokens, strict=True)]
        answers = [query(own, each) for query, own, each in zip(queries, tokens, attended, strict=True)]
        return self.gate(torch.cat(answers)).view_as(tokens)


class TaskInteraction(nn.Module):
    """``LayerNorm(Linear(Attention(X, X, X)))`` over the tokens of all tasks, without a residual.

    The attention is over the tasks at each pixel (``"pixel"``), over all tokens (``"global"``), or has a
    single key per query (``"released"``, ``"linear"``): then softmax gives 1, the value is all that is left,
    and the query and key projections have no effect.

    Args:
        attention: one of ``ATTENTIONS``.
        dim: channels C of the tokens.
        heads: heads of the attention.
    """

    def __init__(self, attention: str, dim: int, heads: int) -> None:
        super().__init__()
        self.mode = attention
        self.attention = GatedAttention(dim, heads) if attention == "global" else TaskAttention(dim, heads)
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(T, B, N, C) → (T, B, N, C)."""
        if self.mode == "pixel":
            return self.norm(attend_pixels([self], tokens, tokens))
        if self.mode in ("released", "linear"):
            return self.norm(functional.linear(tokens, *self.merge_pointwise(tokens.dtype)))
        every = tokens.transpose(0, 1).flatten(1, 2)  # (B, T·N, C)
        attended = self.norm(self.linear(self.attention(every, every)))
        return attended.unflatten(1, (len(tokens), -1)).transpose(0, 1)

    def merge_pointwise(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias of ``Linear(W_o (W_v x + b_v) + b_o)``."""
        attention, output, linear = self.attention, self.attention.out_proj, self.linear
        value_weight, value_bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
        with torch.autocast(value_weight.device.type, enabled=False):
            merged = promote(linear.weight) @ promote(output.weight)
            bias = torch.addmv(promote(linear.bias), promote(linear.weight), promote(output.bias))
            bias = torch.addmv(bias, merged, promote(value_bias))
            return (merged @ promote(value_weight)).to(dtype), bias.to(dtype)


class TaskQuery(nn.Module):
    """``X_t + LayerNorm(Linear(Attention(query=X_t, key=value=X_f)))`` for one task t.

    The keys are the T tasks' tokens at the query's pixel (``"released"``, ``"pixel"``:
    :func:`attend_pixels`, all tasks at once) or all T·N tokens (``"linear"``, without softmax, and
    ``"global"``).

    Args:
        attention: one of ``ATTENTIONS``.
        dim: channels C of the tokens.
        heads: heads of the attention.
    """

    def __init__(self, attention: str, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = QUERY_ATTENTION[attention](dim, heads)
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def attend(self, tokens: Tensor, context: Tensor) -> Tensor:
        """``Linear(Attention)`` of the task's (B, N, C) to (B, T·N, C) → (B, N, C)."""
        return self.linear(self.attention(tokens, context))

    def forward(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """The task's tokens and ``Linear(Attention)`` of them, (B, N, C) each → (B, N, C)."""
        return tokens + self.norm(attended)


class Folded(NamedTuple):
    """The matrices of W blocks' attention after :func:`fold`, as right factors: D = heads·C.

    Attributes:
        query_weight, query_bias: (W, C, D) and (W, 1, D).
        output_weight, output_bias: (W, D, C) and (W, 1, C).
    """

    query_weight: Tensor
    query_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor


def attend_pixels(blocks: Sequence[TaskInteraction | TaskQuery], queries: Tensor, context: Tensor) -> Tensor:
    """``Linear(Attention)`` of S tasks' tokens to all T tasks' tokens at their pixel.

    Keys and values are never projected: ``(W_q x + b_q) · (W_k y + b_k)`` is ``W_kᵀ(W_q x + b_q) · y`` but
    for what all keys of a query have in common, which softmax does not see; and as its weights sum to 1,
    ``Σ a (W_v y + b_v) = W_v (Σ a y) + b_v``, after which only products with constant matrices follow.

    Args:
        blocks: S blocks, one for each query task, or a single one for all.
        queries: (S, B, N, C).
        context: (T, B, N, C).

    Returns:
        (S, B, N, C).
    """
    heads, channels = blocks[0].attention.heads, queries.shape[-1]
    folded = Folded(*(each.to(queries.dtype) for each in fold(blocks)))
    own = queries.reshape(len(blocks), -1, channels)
    query = torch.baddbmm(folded.query_bias, own, folded.query_weight)
    query = query.view(1, len(queries), -1, heads * channels)  # images and pixels on one axis
    scale = (channels // heads) ** -0.5
    attended = task_attention(query, context.flatten(1, 2)[None], heads=heads, scale=scale)
    attended = attended.reshape(len(blocks), -1, heads * channels)
    return torch.baddbmm(folded.output_bias, attended, folded.output_weight).view(queries.shape)


def fold(blocks: Sequence[TaskInteraction | TaskQuery]) -> Folded:
    """Keys folded into queries; values, output projection and Linear into one matrix per head."""
    heads = blocks[0].attention.heads
    attentions = [block.attention for block in blocks]
    weights = [attention.in_proj_weight.unflatten(0, (3, -1)) for attention in attentions]
    biases = [attention.in_proj_bias.unflatten(0, (3, -1)) for attention in attentions]
    with torch.autocast(weights[0].device.type, enabled=False):
        weight = promote(torch.stack(weights, dim=1))  # (3, W, C, C)
        query, key, value = weight.unflatten(2, (heads, -1)).flatten(1, 2)  # (W·heads, C/heads, C) each
        bias = promote(torch.stack(biases, dim=1))  # (3, W, C)
        output = promote(torch.stack([attention.out_proj.weight for attention in attentions])).mT
        output_bias = promote(torch.stack([attention.out_proj.bias for attention in attentions]))
        linear = promote(torch.stack([block.linear.weight for block in blocks])).mT
        linear_bias = promote(torch.stack([block.linear.bias for block in blocks]))

        query_weight = key.mT @ query  # (W·heads, C, C)
        query_bias = key.mT @ bias[0].view(len(query), -1, 1)  # (W·heads, C, 1)
        merged = output @ linear  # (W, C, C)
        output_weight = value.mT @ merged.reshape(value.shape)  # (W·heads, C, C)
        output_bias = torch.baddbmm(linear_bias[:, None], output_bias[:, None], linear)
        output_bias = torch.baddbmm(output_bias, bias[2][:, None], merged)
        return Folded(
            query_weight.view(len(blocks), -1, query.shape[-1]).mT,
            query_bias.view(len(blocks), 1, -1),
            output_weight.view(len(blocks), -1, query.shape[-1]),
            output_bias,
        )


def task_attention(query: Tensor, key: Tensor, *, heads: int, scale: float) -> Tensor:
    """Softmax attention at each pixel of (B, S, N, heads·D) to (B, T, N, D), keys and values of all heads."""
    with torch.autocast(query.device.type, enabled=False):
        queries = promote(query.unflatten(3, (heads, -1)).transpose(1, 2).flatten(2, 3))  # (B, N, S·heads, D)
        tokens = promote(key.transpose(1, 2))  # (B, N, T, D)
        attended = (queries * scale @ tokens.mT).softmax(-1) @ tokens
        attended = attended.unflatten(2, (-1, heads)).transpose(1, 2).flatten(3)
        return attended.to(query.dtype)


def promote(tensor: Tensor) -> Tensor:
    """Half precision to fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
