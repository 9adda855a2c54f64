"""Choosing keys in a few lines of torch: what the native kernels are tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyRule:
    """Which keys a query may take, and how many.

    Args:
        count: runs for each query, at least 1.
        run: neighbours that are taken together by the best of them; runs begin at multiples.
        q_offset: position of the first query, default ``Lk - Lq``.
        causal: no key behind the query.
        window: keys with ``position - key < window``, or None.
        keep_own: the key at a query's own position comes first of all.

    Raises:
        ValueError: a size is below 1.
    """

    count: int
    run: int = 1
    q_offset: int | None = None
    causal: bool = True
    window: int | None = None
    keep_own: bool = True

    def __post_init__(self) -> None:
        if self.count < 1 or self.run < 1:
            raise ValueError(f"count={self.count}, run={self.run}: expected at least 1")

    @property
    def keys(self) -> int:
        """Keys of a query at most."""
        return self.count * self.run


def label_scores_reference(
    query: Tensor, labels: Tensor, span: Tensor | None = None, *, bits: int = 16
) -> Tensor:
    """`label_scores` in torch."""
    heads = labels.shape[1]
    grouped = query.float().unflatten(1, (heads, -1)).flatten(2, 3) * query.shape[-1] ** -0.5
    if span is None:
        scores = grouped @ labels.float().transpose(-1, -2)
    else:
        mask = (1 << bits) - 1
        parts = [(labels >> shift) & mask for shift in range(0, 8, bits)]
        codes = torch.stack(parts, -1).flatten(-2).float()
        scores = grouped @ codes.transpose(-1, -2)
        scores *= span[..., 1].unsqueeze(-2)
        scores += grouped.sum(-1, keepdim=True) * span[..., 0].unsqueeze(-2)
    return scores.unflatten(2, (-1, query.shape[2])).flatten(1, 2)


def choose_by_labels_reference(
    query: Tensor,
    labels: Tensor,
    span: Tensor | None,
    bits: int,
    key_padding: Tensor | None,
    rule: KeyRule,
) -> tuple[Tensor, Tensor]:
    """`choose_by_labels` in torch."""
    scores = label_scores_reference(query, labels, span, bits=bits)
    rows, length = scores.shape[2:]
    offset = length - rows if rule.q_offset is None else rule.q_offset
    position = offset + torch.arange(rows, device=scores.device)
    distance = position[:, None] - torch.arange(length, device=scores.device)
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if rule.causal:
        allowed &= distance >= 0
    if rule.window:
        allowed &= distance < rule.window
    allowed = allowed[None, None]
    if key_padding is not None:
        allowed = allowed & key_padding[:, None, None]
    if rule.keep_own:
        own = position.clamp(max=length - 1)
        row = (own >= 0).nonzero()[:, 0]
        scores[:, :, row, own[row]] = torch.inf
    scores = scores.masked_fill_(~allowed, -torch.inf)
    padded = torch.nn.functional.pad(scores, (0, -length % rule.run), value=-torch.inf)
    best = padded.unflatten(-1, (-1, rule.run)).amax(-1)
    taken = largest_keys_reference(best, min(rule.count, best.shape[-1]))
    lane = torch.arange(rule.run, device=scores.device)
    keys = (taken[..., None] * rule.run + lane).flatten(-2)
    none = padded.gather(-1, keys) == -torch.inf
    keys = keys.masked_fill(none, length).sort(-1).values
    found = (~none).sum(-1)
    keys = torch.nn.functional.pad(keys, (0, rule.keys - keys.shape[-1]), value=length)
    return keys.masked_fill(keys == length, 0).int(), found


def largest_keys_reference(scores: Tensor, k: int) -> Tensor:
    """`largest_keys` in torch."""
    order = torch.sort(scores.float(), dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(-1).values


def pool_rows_reference(x: Tensor, block: int, poolings: tuple[str, ...]) -> Tensor:
    """`pool_rows` in torch."""
    x = x.float()
    short = -x.shape[2] % block
    parts = torch.nn.functional.pad(x, (0, 0, 0, short)).unflatten(2, (-1, block))
    places = torch.arange(x.shape[2] + short, device=x.device).view(-1, block, 1)
    real = places < x.shape[2]
    made = {
        "max": parts.masked_fill(~real, -torch.inf).amax(3),
        "min": parts.masked_fill(~real, torch.inf).amin(3),
        "avg": parts.sum(3) / real.sum(1),
    }
    return torch.cat([made[name] for name in ("max", "min", "avg") if name in poolings], -1)


def pack_codes_reference(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`pack_codes` in torch."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))
    codes = ((x - low) / step).round().clamp(0, 2**bits - 1).to(torch.uint8)
    parts = codes.unflatten(-1, (-1, 8 // bits))
    packed = parts[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= parts[..., place] << (place * bits)
    return packed, torch.cat([low, step], -1)


def choose_blocks_reference(
    scores: Tensor, count: int, *, own: bool, dense_from: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`choose_blocks` in torch."""
    n = scores.shape[-1]
    allowed = scores > -torch.inf
    diagonal = torch.eye(n, dtype=torch.bool, device=scores.device)
    ranked = scores.masked_fill(diagonal & allowed, torch.inf) if own else scores
    order = torch.sort(ranked.float(), dim=-1, descending=True, stable=True).indices[..., :count]
    kept = torch.zeros_like(allowed).scatter(-1, order, True)
    if own and count:
        kept |= diagonal
    if dense_from is not None:
        kept |= (torch.arange(n, device=scores.device) >= dense_from[:, None])[:, None, :, None]
    kept &= allowed
    counts = kept.sum(-1)
    total = counts.sum(-1, keepdim=True)
    first = total.flatten().cumsum(0).view_as(total) - total
    return torch.cat([first, first + counts.cumsum(-1)], -1), kept.nonzero()[:, 3].int()
