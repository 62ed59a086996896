"""The modules around ``spatial_gating_unit`` and ``gated_mlp``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from degmix_kernels import checks
from degmix_kernels.gating.mlp_op import gated_mlp
from degmix_kernels.gating.unit_op import MODES, spatial_gating_unit


class SpatialGatingUnit(nn.Module):
    """The gate of a gated MLP, ``u ⊙ (W · LayerNorm(v) + b)``.

    W starts at 0 and b at 1, so the gate starts as an exact pass-through of u.

    Args:
        dim: channels of u and of v.
        mode: ``"channel"`` or ``"token"``, as in :func:`degmix_kernels.spatial_gating_unit`.
        tokens: number of tokens, fixed; needed in mode ``"token"``, unused in mode ``"channel"``.

    Raises:
        TypeError: for a size that is no integer.
        ValueError: for an unknown mode, or a size below 1.
    """

    def __init__(self, dim: int, mode: str = "channel", tokens: int | None = None) -> None:
        super().__init__()
        checks.expect_integer("dim", dim, 1)
        checks.expect_choice("mode", mode, MODES)
        if mode == "token":
            checks.expect(tokens is not None, "tokens", "a token count in mode 'token'", tokens)
            checks.expect_integer("tokens", tokens, 1)
        size = dim if mode == "channel" else tokens
        self.mode = mode
        self.norm = nn.LayerNorm(dim)
        self.weight = nn.Parameter(torch.empty(size, size))
        self.bias = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the gate a pass-through again."""
        self.norm.reset_parameters()
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)

    def forward(self, u_v: Tensor) -> Tensor:
        """(B, N, 2·dim), u before v → (B, N, dim)."""
        checks.expect_tensor("u_v", u_v)
        checks.expect_dims("u_v", u_v, 3)
        u, v = u_v.chunk(2, dim=-1)
        norm = self.norm
        return spatial_gating_unit(u, v, norm.weight, norm.bias, self.weight, self.bias, self.mode, norm.eps)

    def extra_repr(self) -> str:
        """Constructor arguments."""
        tokens = f", tokens={self.weight.shape[0]}" if self.mode == "token" else ""
        return f"{self.norm.normalized_shape[0]}, mode={self.mode!r}{tokens}"


class GatedMLP(nn.Module):
    """LayerNorm, Linear, GELU, gate, Linear and residual; DeGMix's gating, or a gMLP block.

    The Linear layers keep PyTorch's default initialisation; the gate starts as a pass-through.

    Args:
        dim: channels of the tokens.
        hidden: channels of u and of v; ``dim`` by default.
        mode: as in :class:`SpatialGatingUnit`.
        tokens: as in :class:`SpatialGatingUnit`.
        recompute: keep only the input for the backward pass, as in :func:`degmix_kernels.gated_mlp`.

    Raises:
        TypeError: for a size that is no integer.
        ValueError: for an unknown mode, or a size below 1.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        mode: str = "channel",
        tokens: int | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        for name, size in {"dim": dim, "hidden": hidden}.items():
            checks.expect_integer(name, size, 1)
        self.recompute = checks.scalar("recompute", recompute, bool)
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.gate = SpatialGatingUnit(hidden, mode, tokens)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) → (B, N, dim)."""
        gate = self.gate
        return gated_mlp(
            x,
            self.norm.weight,
            self.norm.bias,
            self.fc1.weight,
            self.fc1.bias,
            gate.norm.weight,
            gate.norm.bias,
            gate.weight,
            gate.bias,
            self.fc2.weight,
            self.fc2.bias,
            gate.mode,
            self.norm.eps,
            self.recompute,
        )
