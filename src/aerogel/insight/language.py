"""What a causal language model makes of text: nats of each token, of plain and repeated parts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SKIPPED = 4  # first tokens of a repetition, from which it is recognised


class PassageNats(NamedTuple):
    """Mean nats a token.

    Attributes:
        plain: before the repetition begins.
        repeat: in the repetition, after the tokens from which it is recognised.
    """

    plain: float
    repeat: float


@torch.no_grad()
def token_nats(model: nn.Module, ids: Tensor, *, batch_size: int = 4) -> Tensor:
    """Loss of every token given all before it, in evaluation mode.

    Args:
        model: token ids (batch, length) to an output with `logits`, or to the logits; its mode is
            restored afterwards.
        ids: (sequences, length) token ids, length >= 2.
        batch_size: sequences at a time.

    Returns:
        (sequences, length - 1) float32 nats on the CPU; entry t belongs to token t + 1.

    Raises:
        ValueError: ids of another shape, or none.
    """
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}, expected (sequences >= 1, length >= 2)"
        )
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    parts = []
    try:
        for part in ids.split(batch_size):
            part = part.to(device)
            output = model(part)
            logits = getattr(output, "logits", output)[:, :-1]
            nats = F.cross_entropy(
                logits.float().transpose(1, 2), part[:, 1:].long(), reduction="none"
            )
            parts.append(nats.cpu())
    finally:
        model.train(was_training)
    return torch.cat(parts)


def passage_nats(
    model: nn.Module, ids: Tensor, repeated: Tensor, *, skip: int = SKIPPED, batch_size: int = 4
) -> PassageNats:
    """Nats on the plain part of sequences and on their repeated end.

    Args:
        model: as for `token_nats`.
        ids: (sequences, length) token ids, as `aerogel.data.recall.repeat_passage` makes them.
        repeated: (sequences, length) bool, true in the repetition at each end.
        skip: first tokens of a repetition that count for neither part.
        batch_size: sequences at a time.

    Raises:
        ValueError: shapes differ, or a part has no token.
    """
    if repeated.shape != ids.shape:
        raise ValueError(
            f"repeated has shape {tuple(repeated.shape)}, expected {tuple(ids.shape)} as ids"
        )
    nats = token_nats(model, ids, batch_size=batch_size)
    repeated = repeated.to("cpu", torch.bool)
    copied = (repeated & (repeated.cumsum(1) > skip))[:, 1:]
    plain = ~repeated[:, 1:]
    if not copied.any() or not plain.any():
        raise ValueError(f"skip={skip}: expected plain and repeated tokens to score")
    return PassageNats(float(nats[plain].mean()), float(nats[copied].mean()))
