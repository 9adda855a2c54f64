"""The mosaic question: four real pictures side by side, and one token that asks about one of them.

Each sample is a 2x2 mosaic of Fashion-MNIST pictures (56x56), cut into 8x8 patches of 7 pixels: 64
visual tokens, then one question token that names a cell; the answer is that cell's class. A Llama
decoder (width 96, 4 layers, 4 heads) reads them causally, and a linear layer on the last token
answers. Trained weights are kept in the cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aerogel import data
from aerogel.data.fetching import cache_root

SIDE, PATCH, CLASSES = 56, 7, 10
VISUAL = (SIDE // PATCH) ** 2
WIDTH, LAYERS, HEADS = 96, 4, 4
STEPS, BATCH, LR = 1000, 64, 2e-3


class MosaicReader(nn.Module):
    """Mosaics (B, 1, 56, 56) in [0, 1] and cells (B,) to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            vocab_size=8, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
            max_position_embeddings=128,
        )  # fmt: skip
        self.decoder = LlamaModel(config)
        self.patches = nn.Linear(PATCH * PATCH, WIDTH)
        self.places = nn.Parameter(torch.randn(VISUAL, WIDTH) * 0.02)
        self.questions = nn.Embedding(4, WIDTH)
        self.answer = nn.Linear(WIDTH, CLASSES)

    def tokens(self, mosaics: Tensor, cells: Tensor) -> Tensor:
        """(B, 65, 96): visual tokens, then the question."""
        x = nn.functional.unfold(mosaics, PATCH, stride=PATCH).transpose(1, 2)
        visual = self.patches((x - 0.286) / 0.353) + self.places
        return torch.cat([visual, self.questions(cells)[:, None]], 1)

    def forward(self, mosaics: Tensor, cells: Tensor, cache: Any = None) -> Tensor:
        x = self.tokens(mosaics, cells)
        hidden = self.decoder(
            inputs_embeds=x, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
        return self.answer(hidden[:, -1])


def mosaics(
    images: Tensor, labels: Tensor, count: int, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Drawn mosaics (count, 1, 56, 56), cells and answers."""
    chosen = torch.randint(len(images), (count, 4), generator=draw)
    cells = torch.randint(4, (count,), generator=draw)
    tiles = images[chosen].float().div(255).view(count, 2, 2, 28, 28)
    pictures = tiles.permute(0, 1, 3, 2, 4).reshape(count, 1, SIDE, SIDE)
    answers = labels[chosen.gather(1, cells[:, None])[:, 0]]
    return pictures, cells, answers


@torch.enable_grad()
def trained(seed: int) -> MosaicReader:
    """The dense model, trained once."""
    torch.manual_seed(seed)
    model = MosaicReader()
    path = Path(cache_root()) / f"mosaic-{STEPS}-{BATCH}-seed{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    train = data.load("fashion-mnist").train
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        pictures, cells, answers = mosaics(train.images, train.labels, BATCH, draw)
        loss = cross_entropy(model(pictures, cells), answers)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
    save_file(model.state_dict(), path)
    return model.eval()


def tested(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mosaics of test pictures."""
    test = data.load("fashion-mnist").test
    return mosaics(test.images, test.labels, count, torch.Generator().manual_seed(1000 + seed))
