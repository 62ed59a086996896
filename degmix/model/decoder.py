"""The task-aware gating decoder: tasks exchange what they found, query it, and gate the answer.

Every product of neighbouring projections is taken of the matrices, once per forward, where this spares
products with the tokens; the functions of the parameters are those of :mod:`degmix.model.formula`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from degmix.model.gathered import gathered
from degmix.model.recompute import checkpointed, recomputed
from degmix_kernels import (
    GatedAttention,
    GatedMLP,
    LinearAttention,
    TaskAttention,
    gated_attention,
    linear_attention,
    linear_norm,
    task_attention,
)
from degmix_kernels.attention.module import join_heads, split_heads

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
        self.gate = GatedMLP(dim, recompute=True)  # its hidden tokens are four times the input

    def forward(self, tokens: Tensor) -> Tensor:
        """(T, B, N, C) → (T, B, N, C)."""
        if self.per_pixel:
            queries = list(self.queries.values())
            first = [self.interaction] if self.interaction.mode == "pixel" else []
            own, folded = fold([*first, *queries]).split(len(first))
            fused = self.interaction(tokens, own)
            answers = attend_pixels(queries, folded, tokens, fused, residuals=tokens)
            return self.gate(torch.cat(answers)).view_as(tokens)
        fused = self.interaction(tokens)
        return self._attend_everywhere(tokens, fused.transpose(0, 1).flatten(1, 2)).view_as(tokens)

    def _attend_everywhere(self, tokens: Tensor, context: Tensor) -> Tensor:
        """(T, B, N, C) and all tasks' (B, T·N, C) → (T·B, N, C)."""
        queries = list(self.queries.values())
        if isinstance(queries[0].attention, LinearAttention):
            attended = attend_linearly([query.attention for query in queries], tokens, context)
        else:
            pairs = zip(queries, tokens, strict=True)
            attended = [attend_tokens(query.attention, own, context) for query, own in pairs]
        projections = zip(*merge(queries, tokens.dtype), strict=True)
        every = []
        for query, x, residual, (weight, bias) in zip(queries, attended, tokens, projections, strict=True):
            every += [x, weight, bias, *norm_of(query.norm), residual]

        def answer(*every: Tensor) -> Tensor:
            return torch.cat([project(*every[i : i + 6]) for i in range(0, len(every), 6)])

        answers = answer(*every)
        with recomputed([(answers, answer, every)]):
            return self.gate(answers)


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

    def forward(self, tokens: Tensor, folded: Folded | None = None) -> Tensor:
        """(T, B, N, C) → (T, B, N, C); ``folded``: this block's matrices, for ``"pixel"``."""
        if self.mode == "pixel":
            (attended,) = attend_pixels([self], folded, tokens, tokens)
            return attended.view_as(tokens)
        if self.mode in ("released", "linear"):
            weight, bias = self.merge_pointwise(tokens.dtype)
            return project(tokens.flatten(0, 1), weight, bias, *norm_of(self.norm)).view_as(tokens)
        every = tokens.transpose(0, 1).flatten(1, 2)  # (B, T·N, C)
        (weight,), (bias,) = merge([self], tokens.dtype)
        attended = attend_tokens(self.attention, every, every)
        attended = project(attended, weight, bias, *norm_of(self.norm))
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


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """``LayerNorm(W x + b) + residual``; what its backward pass needs beside x is computed again there."""
    return checkpointed(partial(linear_norm, residual=residual), x, weight, bias, norm_weight, norm_bias)


def attend_tokens(attention: GatedAttention, query: Tensor, context: Tensor) -> Tensor:
    """Softmax attention of (B, N, C) to all of (B, M, C), before the output projection.

    Its work grows with N·M and is done once; the projections that it needs in its backward pass are products
    with the tokens, and are computed again.
    """
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    projected = attention.project_query(query), *attention.project_context(context)
    parts = [split_heads(each, attention.heads) for each in projected]

    def again(index: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        part = slice(index * attention.dim, (index + 1) * attention.dim)
        return split_heads(functional.linear(x, weight[part], bias[part]), attention.heads)

    inputs = query, context, context
    computes = [
        (each, partial(again, index), (inputs[index], weight, bias)) for index, each in enumerate(parts)
    ]
    with recomputed(computes):
        return join_heads(gated_attention(*parts))


def attend_linearly(attentions: Sequence[LinearAttention], tokens: Tensor, context: Tensor) -> Tensor:
    """Linear attention of T tasks' tokens to all tasks', before the output projections.

    Its work grows as its tokens do, and is done again in the backward pass. LayerNorms of the same tokens
    differ in scale and shift alone, which are taken into the projections: tokens are normalised once.

    Args:
        attentions: T of them.
        tokens: (T, B, N, C).
        context: (B, M, C).

    Returns:
        (T, B, N, C).
    """
    heads, scale, tasks = attentions[0].heads, attentions[0].scale, len(attentions)
    with torch.autocast(tokens.device.type, enabled=False):
        layers = [
            *zip(
                *(((a.norm_q, a.to_q), (a.norm_k, a.to_k), (a.norm_v, a.to_v)) for a in attentions),
                strict=True,
            )
        ]
        pairs = [pair for kind in layers for pair in kind]
        kinds = [[layer.weight for _, layer in pairs]] + [
            [getattr(norm, name) for norm, _ in pairs] for name in ("weight", "bias")
        ]
        weight, gain, shift = map(promote, gathered(kinds))  # (3·T, C, C), (3·T, C) twice
        bias = (weight @ shift[..., None])[..., 0].to(tokens.dtype)
        weight = (weight * gain[:, None]).to(tokens.dtype)

    def attend(tokens: Tensor, context: Tensor) -> Tensor:
        own, every = (functional.layer_norm(each, each.shape[-1:]) for each in (tokens, context))
        query = torch.baddbmm(bias[:tasks, None], own.flatten(1, 2), weight[:tasks].mT)
        query = query.unflatten(2, (heads, -1)).unflatten(1, tokens.shape[1:3])  # (T, B, N, heads, C/heads)
        query = query.permute(1, 0, 3, 2, 4).flatten(1, 2)
        pair = functional.linear(every, weight[tasks:].flatten(0, 1), bias[tasks:].flatten())
        key, value = split_heads(pair, 2 * tasks * heads).chunk(2, dim=1)  # (B, T·heads, M, C/heads)
        attended = linear_attention(query, key, value, scale)
        return attended.unflatten(1, (tasks, heads)).permute(1, 0, 3, 2, 4).flatten(3)

    return checkpointed(attend, tokens, context)


def merge(blocks: Sequence[TaskInteraction | TaskQuery], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights (W, C, C) and biases (W, C) of the Linear behind the output projection, of W blocks."""
    with torch.autocast(blocks[0].linear.weight.device.type, enabled=False):
        pairs = [(output_of(block.attention), block.linear) for block in blocks]
        kinds = zip(*((a.weight, a.bias, b.weight, b.bias) for a, b in pairs), strict=True)
        first, first_bias, weight, bias = map(promote, gathered(list(kinds)))
        bias = torch.baddbmm(bias[..., None], weight, first_bias[..., None])[..., 0]
        return (weight @ first).to(dtype), bias.to(dtype)


def output_of(attention: nn.Module) -> nn.Linear:
    """The output projection."""
    return attention.proj if isinstance(attention, LinearAttention) else attention.out_proj


class Folded(NamedTuple):
    """The matrices of W blocks' attention after :func:`fold`: D = heads·C.

    Attributes:
        query_weight, query_bias: (W, C, D), a right factor, and (W, 1, D).
        output_weight, output_bias: (W, C, D), a left factor, and (W, C).
    """

    query_weight: Tensor
    query_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor

    def split(self, count: int) -> tuple[Folded, Folded]:
        """The matrices of the first ``count`` blocks, and of the rest."""
        return Folded(*(each[:count] for each in self)), Folded(*(each[count:] for each in self))


def attend_pixels(
    blocks: Sequence[TaskInteraction | TaskQuery],
    folded: Folded,
    queries: Tensor,
    context: Tensor,
    residuals: Tensor | None = None,
) -> list[Tensor]:
    """``LayerNorm(Linear(Attention))`` of S tasks' tokens to all T tasks' tokens at their pixel.

    Keys and values are never projected: ``(W_q x + b_q) · (W_k y + b_k)`` is ``W_kᵀ(W_q x + b_q) · y`` but
    for what all keys of a query have in common, which softmax does not see; and as its weights sum to 1,
    ``Σ a (W_v y + b_v) = W_v (Σ a y) + b_v``, after which only products with constant matrices follow.

    Args:
        blocks: S blocks, one for each query task, or a single one for all.
        folded: their matrices.
        queries: (S, B, N, C).
        context: (T, B, N, C).
        residuals: (S, B, N, C), added to the result.

    Returns:
        One result per block: S of (B, N, C), or one of (S·B, N, C).
    """
    heads, channels = blocks[0].attention.heads, queries.shape[-1]
    folded = Folded(*(each.to(queries.dtype) for each in folded))

    def attend(queries: Tensor, context: Tensor, residuals: Tensor | None) -> list[Tensor]:
        own = queries.reshape(len(blocks), -1, channels)
        query = torch.baddbmm(folded.query_bias, own, folded.query_weight)
        query = query.view(1, len(queries), -1, heads * channels)  # images and pixels on one axis
        scale = (channels // heads) ** -0.5
        attended = task_attention(query, context.flatten(1, 2)[None], heads=heads, scale=scale)
        attended = attended.reshape(len(blocks), -1, queries.shape[2], heads * channels)
        results = []
        for index, block in enumerate(blocks):
            projection = folded.output_weight[index], folded.output_bias[index]
            residual = None if residuals is None else residuals[index]
            results.append(linear_norm(attended[index], *projection, *norm_of(block.norm), residual=residual))
        return results

    # What lies between is five times the size of the result, and soon computed again.
    norms = [each for block in blocks for each in norm_of(block.norm)]
    return checkpointed(attend, queries, context, residuals, parameters=norms)


def fold(blocks: Sequence[TaskInteraction | TaskQuery]) -> Folded:
    """Keys folded into queries; values, output projection and Linear into one matrix per head."""
    heads = blocks[0].attention.heads
    with torch.autocast(blocks[0].linear.weight.device.type, enabled=False):
        every = map(promote, gathered(list(zip(*map(factors, blocks), strict=True))))
        query, key, value, query_bias, value_bias, output, output_bias, linear, linear_bias = every
        # (W·heads, C/heads, C) each; where heads fold into the batch nothing is copied
        query, key, value = (each.unflatten(1, (heads, -1)).flatten(0, 1) for each in (query, key, value))
        query_weight = key.mT @ query  # (W·heads, C, C)
        query_bias = key.mT @ query_bias.view(len(query), -1, 1)  # (W·heads, C, 1)
        merged = linear @ output  # (W, C, C)
        by_head = merged.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)  # (W·heads, C, C/heads)
        output_weight = (by_head @ value).unflatten(0, (-1, heads))  # (W, heads, C, C)
        output_bias = torch.baddbmm(linear_bias[..., None], linear, output_bias[..., None])
        output_bias = torch.baddbmm(output_bias, merged, value_bias[..., None])
        return Folded(
            query_weight.view(len(blocks), -1, query.shape[-1]).mT,
            query_bias.view(len(blocks), 1, -1),
            output_weight.transpose(1, 2).flatten(2),
            output_bias[..., 0],
        )


def factors(block: TaskInteraction | TaskQuery) -> tuple[Tensor, ...]:
    """What :func:`fold` multiplies, of one block; a key's bias has no effect."""
    attention, output, linear = block.attention, block.attention.out_proj, block.linear
    query_bias, _, value_bias = attention.in_proj_bias.chunk(3)
    return (
        *attention.in_proj_weight.chunk(3), query_bias, value_bias, output.weight, output.bias,
        linear.weight, linear.bias,
    )  # fmt: skip


def norm_of(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift of a LayerNorm, whose eps is the default."""
    return norm.weight, norm.bias


def promote(tensor: Tensor) -> Tensor:
    """Half precision to fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
