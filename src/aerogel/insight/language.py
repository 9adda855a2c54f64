"""What a causal language model makes of text: nats of each token, of plain and repeated parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SKIPPED = 4  # first tokens of a repetition, from which it is recognised
_LOGITS = 1 << 24  # at a time: 64 MB in float32
# Fields of a config that say that logits are more than the output layer's result.
_ADJUSTED = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class PassageNats(NamedTuple):
    """Mean nats a token.

    Attributes:
        plain: before the repetition begins.
        repeat: in the repetition, after the tokens from which it is recognised.
    """

    plain: float
    repeat: float


@torch.no_grad()
def token_nats(model: nn.Module, ids: Tensor, *, batch_size: int = 1) -> Tensor:
    """Loss of every token given all before it in its sequence, in evaluation mode.

    All tokens of a sequence go through the model in one call without a KV cache, so that this
    scores what a model's attention does in prefill. Where transformers' model has a plain output
    layer, logits exist for a part of the tokens at a time: 128k tokens of a vocabulary of 50k would
    be 26 GB.

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
    try:
        rows = [
            torch.cat(list(_nats(model, part.to(device).long())), 1)
            for part in ids.split(batch_size)
        ]
    finally:
        model.train(was_training)
    return torch.cat(rows)


def passage_nats(
    model: nn.Module, ids: Tensor, repeated: Tensor, *, skip: int = SKIPPED, batch_size: int = 1
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
    repeated = repeated.to("cpu", torch.bool)
    copied = (repeated & (repeated.cumsum(1) > skip))[:, 1:]
    plain = ~repeated[:, 1:]
    if not copied.any() or not plain.any():
        raise ValueError(f"skip={skip}: expected plain and repeated tokens to score")
    nats = token_nats(model, ids, batch_size=batch_size)
    return PassageNats(float(nats[plain].mean()), float(nats[copied].mean()))


def _nats(model: nn.Module, ids: Tensor) -> Iterator[Tensor]:
    """Losses (batch, n) of successive tokens."""
    head = _output_layer(model)
    if head is None:
        output = model(ids)
        yield _losses(getattr(output, "logits", output)[:, :-1], ids[:, 1:])
        return
    base: Any = model.base_model
    hidden = base(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    step = max(1, _LOGITS // (len(ids) * head.weight.shape[0]))
    for start in range(0, hidden.shape[1], step):
        part = slice(start, start + step)
        yield _losses(head(hidden[:, part]), ids[:, 1:][:, part])


def _output_layer(model: Any) -> Any:
    """The layer from hidden states to logits, or None where that is not all there is to it."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "base_model"):
        return None
    config = model.config.get_text_config(decoder=True)
    if model.base_model is model or any(getattr(config, name, None) for name in _ADJUSTED):
        return None
    return model.get_output_embeddings()


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().transpose(1, 2), target, reduction="none").cpu()
