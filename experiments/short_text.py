"""Shared by experiments that train a byte model for a minute: Python's own source, from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aerogel.data import recall

BETAS, WEIGHT_DECAY, CLIP, WARMUP, LAST_LR = (0.9, 0.95), 0.1, 1.0, 20, 0.1  # as tiny_lm's
VOCAB = 256

Batches = Callable[[torch.Generator], recall.Weighted]


def train(model: nn.Module, batches: Batches, steps: int, rate: float, seed: int) -> nn.Module:
    """Trains in place, for so many steps of AdamW under a cosine.

    Args:
        model: ids (batch, n) to logits (batch, n, 256); its `auxiliary_loss()`, if any, is added.
        batches: the next batch, drawn from a generator.
        steps: of the optimizer.
        rate: the largest.
        seed: of the batches.

    Returns:
        The model, in evaluation mode.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    auxiliary = getattr(model, "auxiliary_loss", lambda: 0.0)
    model.train()
    for step in range(steps):
        falling = LAST_LR + (1 - LAST_LR) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / WARMUP) * falling
        ids, weights = batches(draw)
        losses = F.cross_entropy(
            model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum() + auxiliary()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def nats(model: nn.Module, ids: Tensor) -> Tensor:
    """(sequences, n - 1) nats of every byte but the first."""
    found = []
    for each in ids.split(4):
        logits = model(each)[:, :-1]
        found.append(F.cross_entropy(logits.transpose(1, 2), each[:, 1:], reduction="none"))
    return torch.cat(found)
