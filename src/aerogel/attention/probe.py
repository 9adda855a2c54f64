"""How much attention each key takes, from a few probing rows; and how many keys a share needs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aerogel.arguments import check_count, check_number
from aerogel.attention.softmax import masked_attention
from aerogel.attention.topk import topk_mass


def probe_rows(
    length: int, recent: float = 0.05, random: float = 0.05, most: int = 256, seed: int = 0
) -> Tensor:
    """Rows of a prompt that vote on its keys: (n,) int64, ascending; the last row always is one.

    Args:
        length: tokens of the prompt.
        recent: share of the rows taken from the end.
        random: share drawn from the others, without replacement.
        most: rows at most; both shares shrink alike.
        seed: the same for the same rows.

    Raises:
        ValueError: an argument is out of range.
    """
    check_count("length", length, 0)
    check_number("recent", recent, "[0, 1]")
    check_number("random", random, "[0, 1]")
    check_count("most", most)
    check_count("seed", seed, 0)
    count = math.ceil(recent * length), math.ceil(random * length)
    if sum(count) > most:
        shrink = most / sum(count)
        count = math.ceil(count[0] * shrink), int(count[1] * shrink)
    last = min(max(1, count[0]), length)
    draw = torch.Generator().manual_seed(seed)
    drawn = min(count[1], most - last)  # the last row counts even where `recent` is 0
    others = torch.randperm(length - last, generator=draw)[:drawn].sort().values
    return torch.cat([others, torch.arange(length - last, length)])


def probe_scores(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_padding: Tensor | None = None,
) -> Tensor:
    """Attention that each key takes from the probing rows, mean over heads: (B, Lk) float32.

    Every probing row gives 1 in all. One head's rows x keys probabilities are held at a time.

    Args:
        q: (B, Hq, L, D).
        k: (B, Hkv, L, D).
        rows: (B, n) int64 rows of q; -1 is none.
        causal: row i reads keys j <= i.
        scale: factor of the logits, default ``D ** -0.5``.
        key_padding: (B, L) bool, True at real keys.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys = torch.arange(k.shape[2], device=q.device)
    mask = (rows >= 0)[..., None].expand(-1, -1, k.shape[2])
    if causal:
        mask = mask & (keys <= rows[..., None])
    if key_padding is not None:
        mask = mask & key_padding[:, None]
    at = rows.clamp(min=0)[..., None].expand(-1, -1, q.shape[-1])
    scores = torch.zeros(k.shape[0], k.shape[2], device=q.device)
    nothing = k.new_zeros(*k.shape[:1], k.shape[2], 1)
    for head in range(q.shape[1]):
        shared = k[:, head * k.shape[1] // q.shape[1]]
        _, _, p = masked_attention(q[:, head].gather(1, at), shared, nothing, mask, scale=scale)
        scores += p.sum(1)
    return scores / q.shape[1]


def mass_budget(scores: Tensor, tau: float) -> Tensor:
    """The fewest entries that hold a share of the total: (...) int64.

    Args:
        scores: (..., n), not negative.
        tau: share, in (0, 1]; 1 means all n entries, those of no mass too.

    Raises:
        ValueError: `tau` is out of range.
    """
    check_number("tau", tau, "(0, 1]")
    return topk_mass(scores, tau).sum(-1)
