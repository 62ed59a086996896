"""The module around ``linear_norm``."""

from __future__ import annotations

from torch import Tensor, nn

from degmix_kernels import checks
from degmix_kernels.linear_norm.op import linear_norm


class LinearNorm(nn.Module):
    """A Linear and a LayerNorm, initialised as PyTorch does.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        bias: whether the Linear has a bias.
        eps: of the LayerNorm.

    Raises:
        TypeError: for a channel count that is no integer, or another argument of a wrong type.
        ValueError: for a channel count below 1, or a negative eps.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        checks.expect_integer("in_channels", in_channels, 1)
        checks.expect_integer("out_channels", out_channels, 1)
        checks.scalar("bias", bias, bool)
        checks.scalar("eps", eps, float, allowed=checks.Range(minimum=0.0))
        self.linear = nn.Linear(in_channels, out_channels, bias=bias)
        self.norm = nn.LayerNorm(out_channels, eps=eps)

    def forward(self, x: Tensor, addend: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, Cout), or (B, C, H, W) → (B, Cout, H, W)."""
        linear, norm = self.linear, self.norm
        return linear_norm(x, linear.weight, linear.bias, norm.weight, norm.bias, addend, residual, norm.eps)
