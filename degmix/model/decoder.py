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
            heads, queries = self.interaction.attention.heads, list(self.queries.values())
            first = [self.interaction] if self.interaction.mode == "pixel" else []
            own, folded = split(fold([*first, *queries]), len(first))
            fused = self.interaction(tokens, own)
            return self.gate(attend_pixels(folded, heads, tokens, fused, tokens)).view_as(tokens)
        return self._attend_everywhere(tokens).view_as(tokens)

    def _attend_everywhere(self, tokens: Tensor) -> Tensor:
        """(T, B, N, C) → (T·B, N, C), of attention to all tasks' tokens."""
        queries = list(self.queries.values())
        attentions = [query.attention for query in queries]
        if self.interaction.mode == "linear":
            projection = merge(queries, tokens.dtype)
            fused = self.interaction(tokens)
            attended = [attend_linearly(attentions, tokens, join_tasks(fused)).flatten(0, 1)]
        else:
            own, projection = split(merge([self.interaction, *queries], tokens.dtype), 1)
            context = join_tasks(self.interaction(tokens, own))
            attended = attend_tokens(attentions, tokens, context)
        every = tokens.flatten(0, 1), *projection, *attended

        def answer(residual: Tensor, *every: Tensor) -> Tensor:
            projection, attended = every[:4], every[4:]
            x = torch.cat(attended) if len(attended) > 1 else attended[0]
            return linear_norm(x, *projection, residual=residual)

        answers = checkpointed(answer, *every)
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

    def forward(self, tokens: Tensor, own: Folded | Projection | None = None) -> Tensor:
        """(T, B, N, C) → (T, B, N, C).

        Args:
            tokens: of all tasks.
            own: this block's matrices, for ``"pixel"`` by :func:`fold`, for ``"global"`` by :func:`merge`.
        """
        if self.mode == "pixel":
            return attend_pixels(own, self.attention.heads, tokens, tokens).view_as(tokens)
        if self.mode == "global":
            attended = attend_all_tokens(self.attention, join_tasks(tokens))
            attended = checkpointed(linear_norm, attended, *own)
            return attended.unflatten(1, (len(tokens), -1)).transpose(0, 1)
        merged = self.merge_pointwise(tokens.dtype)
        norm = self.norm.weight, self.norm.bias
        return checkpointed(linear_norm, tokens.flatten(0, 1), *merged, *norm).view_as(tokens)

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


class Projection(NamedTuple):
    """A Linear and the LayerNorm behind it, of W blocks.

    Attributes:
        weight, bias: (W, C, D) and (W, C), in the dtype of the tokens.
        norm_weight, norm_bias: (W, C).
    """

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def join_tasks(tokens: Tensor) -> Tensor:
    """(T, B, N, C) → (B, T·N, C)."""
    return tokens.transpose(0, 1).flatten(1, 2)


def attend_all_tokens(attention: GatedAttention, tokens: Tensor) -> Tensor:
    """Softmax attention of (B, M, C) to itself, before the output projection."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    parts = functional.linear(tokens, weight, bias).chunk(3, dim=2)
    pairs = zip(weight.chunk(3), bias.chunk(3), strict=True)
    return attend(attention.heads, parts, [(tokens, *pair) for pair in pairs])


def attend_tokens(attentions: Sequence[GatedAttention], tokens: Tensor, context: Tensor) -> list[Tensor]:
    """Softmax attention of T tasks' tokens to all tasks', before the output projections.

    Args:
        attentions: T of them.
        tokens: (T, B, N, C).
        context: (B, M, C).

    Returns:
        T of (B, N, C).
    """
    kinds = [
        [a.in_proj_weight.chunk(3)[0] for a in attentions],
        [a.in_proj_bias.chunk(3)[0] for a in attentions],
    ]
    weight, bias = (kind.to(tokens.dtype) for kind in gathered(kinds))
    queries = torch.baddbmm(bias[:, None], tokens.flatten(1, 2), weight.mT).view_as(tokens)
    results = []
    for index, attention in enumerate(attentions):
        pair = attention.in_proj_weight[attention.dim :], attention.in_proj_bias[attention.dim :]
        parts = queries[index], *functional.linear(context, *pair).chunk(2, dim=2)
        keys_and_values = zip(*(each.chunk(2) for each in pair), strict=True)
        factors = [(tokens[index], weight[index], bias[index])] + [
            (context, *each) for each in keys_and_values
        ]
        results.append(attend(attention.heads, parts, factors))
    return results


def attend(heads: int, parts: Sequence[Tensor], factors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Softmax attention of queries to keys and values, (B, N, C) and (B, M, C) twice, to (B, N, C).

    Its work grows with N·M and is done once; the projections that it needs in its backward pass are products
    with the tokens, and are computed again.

    Args:
        heads: number of heads.
        parts: queries, keys and values.
        factors: tokens, weight and bias of the Linear that made each of them.
    """

    def again(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return split_heads(functional.linear(tokens, weight, bias), heads)

    parts = [split_heads(part, heads) for part in parts]
    with recomputed([(part, again, inputs) for part, inputs in zip(parts, factors, strict=True)]):
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


def merge(blocks: Sequence[TaskInteraction | TaskQuery], dtype: torch.dtype) -> Projection:
    """Output projection and Linear of W blocks as one, in ``dtype``, and the LayerNorm that follows."""
    with torch.autocast(blocks[0].linear.weight.device.type, enabled=False):
        rows = [(output_of(block.attention), block.linear, block.norm) for block in blocks]
        every = [[each for layer in row for each in (layer.weight, layer.bias)] for row in rows]
        first, first_bias, weight, bias, *norm = map(promote, gathered(list(zip(*every, strict=True))))
        bias = torch.baddbmm(bias[..., None], weight, first_bias[..., None])[..., 0]
        return Projection((weight @ first).to(dtype), bias.to(dtype), *norm)


def output_of(attention: nn.Module) -> nn.Linear:
    """The output projection."""
    return attention.proj if isinstance(attention, LinearAttention) else attention.out_proj


class Folded(NamedTuple):
    """The matrices of W blocks' attention after :func:`fold`, D = heads·C, and the LayerNorm that follows.

    Attributes:
        query_weight, query_bias: (W, C, D), a right factor, and (W, 1, D).
        weight, bias: (W, C, D), a left factor, and (W, C).
        norm_weight, norm_bias: (W, C).
    """

    query_weight: Tensor
    query_bias: Tensor
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def split(matrices: Folded | Projection, count: int) -> tuple[Folded, Folded] | tuple[Projection, Projection]:
    """The matrices of the first ``count`` blocks, and of the rest."""
    kind = type(matrices)
    return kind(*(each[:count] for each in matrices)), kind(*(each[count:] for each in matrices))


def attend_pixels(
    folded: Folded, heads: int, queries: Tensor, context: Tensor, residuals: Tensor | None = None
) -> Tensor:
    """``LayerNorm(Linear(Attention))`` of S tasks' tokens to all T tasks' tokens at their pixel.

    Keys and values are never projected: ``(W_q x + b_q) · (W_k y + b_k)`` is ``W_kᵀ(W_q x + b_q) · y`` but
    for what all keys of a query have in common, which softmax does not see; and as its weights sum to 1,
    ``Σ a (W_v y + b_v) = W_v (Σ a y) + b_v``, after which only products with constant matrices follow.

    Args:
        folded: the matrices of S blocks, one for each query task, or of a single one for all.
        heads: number of heads.
        queries: (S, B, N, C).
        context: (T, B, N, C).
        residuals: (S, B, N, C), added to the result.

    Returns:
        (S·B, N, C).
    """
    *matrices, norm_weight, norm_bias = folded
    query_weight, query_bias, weight, bias = (each.to(queries.dtype) for each in matrices)
    channels = queries.shape[-1]

    def attend(queries: Tensor, context: Tensor, residuals: Tensor | None) -> Tensor:
        own = queries.reshape(len(weight), -1, channels)
        query = torch.baddbmm(query_bias, own, query_weight)
        query = query.view(1, len(queries), -1, heads * channels)  # images and pixels on one axis
        scale = (channels // heads) ** -0.5
        attended = task_attention(query, context.flatten(1, 2)[None], heads=heads, scale=scale)
        attended = attended.reshape(-1, queries.shape[2], heads * channels)
        residual = None if residuals is None else residuals.flatten(0, 1)
        return linear_norm(attended, weight, bias, norm_weight, norm_bias, residual=residual)

    # What lies between is five times the size of the result, and soon computed again.
    return checkpointed(attend, queries, context, residuals)


def fold(blocks: Sequence[TaskInteraction | TaskQuery]) -> Folded:
    """Keys folded into queries; values, output projection and Linear into one matrix per head."""
    heads = blocks[0].attention.heads
    with torch.autocast(blocks[0].linear.weight.device.type, enabled=False):
        every = map(promote, gathered(list(zip(*map(factors, blocks), strict=True))))
        query, key, value, query_bias, value_bias, output, output_bias, linear, linear_bias, *norm = every
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
            *norm,
        )


def factors(block: TaskInteraction | TaskQuery) -> tuple[Tensor, ...]:
    """What :func:`fold` multiplies, of one block; a key's bias has no effect."""
    attention, output, linear = block.attention, block.attention.out_proj, block.linear
    query_bias, _, value_bias = attention.in_proj_bias.chunk(3)
    return (
        *attention.in_proj_weight.chunk(3), query_bias, value_bias, output.weight, output.bias,
        linear.weight, linear.bias, block.norm.weight, block.norm.bias,
    )  # fmt: skip


def promote(tensor: Tensor) -> Tensor:
    """Half precision to fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
