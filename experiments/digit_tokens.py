"""Shared by experiments on attention: scikit-learn's digits read as 64 tokens of 17 grey values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from aerogel.data import digits

TOKENS, GREYS, CLASSES = 64, 17, 10
WIDTH = 64
BATCH, RATE = 64, 3e-3


class DigitBlock(nn.Module):
    """A pre-norm block around an attention layer, (batch, 64, WIDTH) to the same."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.before, self.between = (nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 64, WIDTH)."""
        x = x + self.attention(self.before(x))
        out: Tensor = x + self.mlp(self.between(x))
        return out


class DigitReader(nn.Module):
    """Blocks around attention layers, and a linear classifier.

    Args:
        attentions: each (batch, 64, WIDTH) to the same.
        pool: "last" token or "mean" over tokens.
    """

    def __init__(self, attentions: list[nn.Module], pool: str) -> None:
        super().__init__()
        self.grey = nn.Embedding(GREYS, WIDTH)
        self.place = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(DigitBlock(attention) for attention in attentions)
        self.after = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.pool = pool

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, 10) of grey values (batch, 64)."""
        x = self.grey(ids) + self.place
        for block in self.blocks:
            x = block(x)
        x = self.after(x)
        logits: Tensor = self.head(x[:, -1] if self.pool == "last" else x.mean(1))
        return logits


def tokens() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Grey values (n, 64) int64 and labels (n,) to train on, and the same to test on."""
    data = digits.load()
    parts: list[Tensor] = []
    for split in (data.train, data.test):
        grey = (split.images.float() * (GREYS - 1) / 255).round().long()
        parts += [grey.flatten(1), split.labels]
    return parts[0], parts[1], parts[2], parts[3]


def accuracy(
    make: Callable[[], nn.Module], pool: str, epochs: int, seed: int, layers: int = 1
) -> float:
    """Test accuracy in % of a reader trained from scratch around the layers that `make()` gives."""
    torch.manual_seed(seed)
    model = DigitReader([make() for _ in range(layers)], pool)
    x, y, test_x, test_y = tokens()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for rows in order[: len(x) // BATCH * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            for block in model.blocks:
                auxiliary = getattr(block.attention, "auxiliary", None)
                loss = loss if auxiliary is None else loss + auxiliary
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return 100.0 * float((model(test_x).argmax(-1) == test_y).float().mean())
