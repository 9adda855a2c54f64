"""A transformer block with the normalisation before each branch, around any attention layer."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn


class DecoderBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
        dim: width.
        attention: (batch, n, dim) and keyword arguments to (batch, n, dim).
        dropout: of both branches.
        hidden: width of the perceptron, default four times `dim`.
        activation: of the perceptron, "gelu" or "relu".
        norm_eps: of both normalisations.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        dropout: float = 0.0,
        hidden: int | None = None,
        activation: Literal["gelu", "relu"] = "gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        self.before, self.between = (nn.LayerNorm(dim, eps=norm_eps) for _ in range(2))
        self.attention = attention
        middle = nn.GELU() if activation == "gelu" else nn.ReLU()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), middle, nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """Tokens (batch, n, dim); `options` go to the attention layer."""
        x = x + self.dropout(self.attention(self.before(x), **options))
        out: Tensor = x + self.dropout(self.mlp(self.between(x)))
        return out
