"""The task-aware gating decoder: tasks exchange what they found, query it, and gate the answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
        tasks: names of the T tasks, the order of axis 1.
        attention: one of ``ATTENTIONS``.
        dim: channels C of the tokens.
        heads: heads of every attention.
    """

    def __init__(self, tasks: Sequence[str], attention: str, dim: int, heads: int) -> None:
        super().__init__()
        self.interaction = TaskInteraction(attention, dim, heads)
        self.queries = nn.ModuleDict({task: TaskQuery(attention, dim, heads) for task in tasks})
        self.gate = GatedMLP(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, N, C) → (B, T, N, C)."""
        fused = self.interaction(tokens)
        queries = zip(self.queries.values(), tokens.unbind(1), strict=True)
        answers = torch.stack([query(own, fused) for query, own in queries], dim=1)
        return self.gate(answers.flatten(0, 1)).view_as(answers)


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
        """(B, T, N, C) → (B, T, N, C)."""
        return self.norm(self.linear(self._attend(tokens)))

    def _attend(self, tokens: Tensor) -> Tensor:
        if self.mode in ("released", "linear"):
            return self.attention.out_proj(self.attention.project_value(tokens))
        if self.mode == "pixel":
            return self.attention(tokens, tokens)
        every = tokens.flatten(1, 2)
        return self.attention(every, every).view_as(tokens)


class TaskQuery(nn.Module):
    """``X_t + LayerNorm(Linear(Attention(query=X_t, key=value=X_f)))`` for one task t.

    The keys are the T tasks' tokens at the query's pixel (``"released"``, ``"pixel"``) or all T·N tokens
    (``"linear"``, without softmax, and ``"global"``).

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

    def forward(self, tokens: Tensor, fused: Tensor) -> Tensor:
        """The task's (B, N, C), all tasks' (B, T, N, C) → (B, N, C)."""
        if isinstance(self.attention, TaskAttention) and not isinstance(self.attention, GatedAttention):
            attended = self.attention(tokens[:, None], fused)[:, 0]
        else:
            attended = self.attention(tokens, fused.flatten(1, 2))
        return tokens + self.norm(self.linear(attended))
