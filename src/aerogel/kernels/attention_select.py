"""Choosing keys: scores from labels, the largest of many scores, blocks of tokens pooled.

A label is a few channels of a key. Scores of the queries that share labels stay in the second cache
while the largest are found, so that labels are all that comes from memory.

Reference: Yang et al., Double Sparsity, arXiv 2408.07092; csrc/attention_select.h describes the
kernels.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels._calls import address
from aerogel.kernels._library import native, native_in_use
from aerogel.kernels.attention import attention_forward
from aerogel.kernels.attention_lower import TileStream
from aerogel.kernels.attention_select_reference import (
    KeyRule,
    choose_blocks_reference,
    choose_by_labels_reference,
    label_scores_reference,
    largest_keys_reference,
    pack_codes_reference,
    pool_rows_reference,
)

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CODES = {8: 3, 4: 4, 2: 5}
_TILE_KEYS, _GATHER = 64, 2


def selects_natively(*tensors: Tensor | None) -> bool:
    """Whether the native kernels are there and can read all of these."""
    usable = all(t is None or t.is_cpu for t in tensors)
    return usable and native_in_use() is not None


def label_scores(
    query: Tensor,
    labels: Tensor,
    span: Tensor | None = None,
    *,
    bits: int = 16,
    threads: int | None = None,
) -> Tensor:
    """Approximate logits of all keys from their labels alone.

    Args:
        query: (B, Hq, Lq, r) the queries' own channels; scaled here by ``r ** -0.5``.
        labels: (B, Hlab, Lk, r) in float32, bfloat16 or float16; or (B, Hlab, Lk, r * bits / 8)
            uint8 codes, the first channel in the lowest bits. Hlab divides Hq.
        span: (B, Hlab, Lk, 2) float32, low and step of each label: ``low + step * code``.
        bits: of a code, 8, 4 or 2; 16 without `span`.
        threads: default `torch.get_num_threads()`; the result does not depend on it.

    Returns:
        (B, Hq, Lq, Lk) float32.

    Raises:
        ValueError: shapes or types do not fit.
    """
    _check_labels(query, labels, span, bits)
    if not selects_natively(query, labels, span) or labels.dtype not in (*_TYPES, torch.uint8):
        return label_scores_reference(query, labels, span, bits=bits)
    scores = torch.empty(*query.shape[:3], labels.shape[2], dtype=torch.float32, device="cpu")
    args, _keep = _label_args(query, labels, span, bits)
    native().label_scores(args, scores.data_ptr(), _threads(threads))
    return scores


def choose_by_labels(
    query: Tensor,
    labels: Tensor,
    span: Tensor | None = None,
    *,
    rule: KeyRule,
    bits: int = 16,
    key_padding: Tensor | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The keys with the largest scores, for every query; no score leaves the caches.

    Args:
        query: as `label_scores`.
        labels: as `label_scores`.
        span: as `label_scores`.
        rule: how many keys, and which.
        bits: as `label_scores`.
        key_padding: (B, Lk) bool, True at real keys.
        threads: default `torch.get_num_threads()`; the result does not depend on it.

    Returns:
        keys: (B, Hq, Lq, rule.keys) int32, ascending; equal scores go to the lowest key. found:
        (B, Hq, Lq) int64, how many of them count; the rest is 0.

    Raises:
        ValueError: shapes, types or sizes do not fit.
    """
    _check_labels(query, labels, span, bits)
    batch, _, q_len, _ = query.shape
    k_len = labels.shape[2]
    if key_padding is not None and (
        key_padding.dtype != torch.bool or tuple(key_padding.shape) != (batch, k_len)
    ):
        raise ValueError(
            f"key_padding: {key_padding.dtype} {tuple(key_padding.shape)}, expected bool "
            f"{(batch, k_len)}"
        )
    if rule.q_offset is None:
        rule = replace(rule, q_offset=k_len - q_len)
    known = labels.dtype in (*_TYPES, torch.uint8)
    if not known or not selects_natively(query, labels, span, key_padding):
        return choose_by_labels_reference(query, labels, span, bits, key_padding, rule)
    keys = torch.empty(*query.shape[:3], rule.keys, dtype=torch.int32, device="cpu")
    found = torch.empty(query.shape[:3], dtype=torch.int64, device="cpu")
    args, _keep = _label_args(query, labels, span, bits)
    padding = None if key_padding is None else key_padding.contiguous()
    native().choose_by_labels(
        args,
        address(padding),
        rule.q_offset,
        rule.causal,
        rule.window or 0,
        rule.keep_own,
        rule.count,
        rule.run,
        keys.data_ptr(),
        found.data_ptr(),
        _threads(threads),
    )
    return keys, found


def chosen_tiles(keys: Tensor, found: Tensor) -> TileStream:
    """The tiles of keys that `choose_by_labels` found, for query tiles of one row."""
    rows, most = found.numel(), keys.shape[-1]
    begin, start, tile_ptr, kind = _tile_frame(rows, most)
    if selects_natively(found) and found.is_contiguous():
        length = torch.empty(start.numel(), dtype=torch.int16, device="cpu")
        native().tile_lengths(found.data_ptr(), rows, most, _TILE_KEYS, length.data_ptr())
    else:
        length = (found.view(-1, 1) - begin).clamp_(0, _TILE_KEYS).to(torch.int16).flatten()
    return TileStream(tile_ptr, kind, start, length, keys.view(-1), None)


@lru_cache(maxsize=64)
def _tile_frame(rows: int, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the tiles of so many rows and keys have in common: the same ones in every step."""
    begin = torch.arange(0, most, _TILE_KEYS)
    start = torch.arange(0, rows * most, most)[:, None] + begin
    tiles = start.numel()
    tile_ptr = torch.arange(0, tiles + 1, len(begin))
    return begin, start.flatten().int(), tile_ptr, torch.full((tiles,), _GATHER, dtype=torch.uint8)


def label_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query: Tensor,
    labels: Tensor,
    span: Tensor | None = None,
    *,
    rule: KeyRule,
    bits: int = 16,
    key_padding: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Decoding with labels: scores, the best keys, and exact attention over those.

    Args:
        q: (B, Hq, Lq, D), the last Lq rows; each reads keys up to its own.
        k: (B, Hkv, Lk, D).
        v: (B, Hkv, Lk, Dv).
        query: as `choose_by_labels`, as all of labels, span, rule, bits, key_padding and threads.
        labels: see `query`.
        span: see `query`.
        rule: see `query`; causal, for the last rows.
        bits: see `query`.
        key_padding: see `query`.
        scale: as `attention_forward`.
        softcap: as `attention_forward`.
        sink_logit: as `attention_forward`.
        threads: see `query`.

    Returns:
        o (B, Hq, Lq, Dv) and lse (B, Hq, Lq), as `attention_forward`.

    Raises:
        ValueError: as the two.
    """
    keys, found = choose_by_labels(
        query, labels, span, rule=rule, bits=bits, key_padding=key_padding, threads=threads
    )
    return attention_forward(
        q, k, v, *chosen_tiles(keys, found)[:5], Bp=q.shape[0], Hp=q.shape[1], block_q=1,
        scale=scale, softcap=softcap, sink_logit=sink_logit, threads=threads,
    )  # fmt: skip


def largest_keys(scores: Tensor, k: int, *, threads: int | None = None) -> Tensor:
    """Places of the k largest entries of every row.

    Args:
        scores: (..., n) floats, compared as float32; NaN is above all.
        k: 0 to n.
        threads: default `torch.get_num_threads()`; the result does not depend on it.

    Returns:
        (..., k) int64, ascending; equal entries go to the lowest place.

    Raises:
        ValueError: k is out of range.
    """
    n = scores.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"k={k}: expected 0 to {n}")
    if not selects_natively(scores):
        return largest_keys_reference(scores, k)
    flat = scores.to(torch.float32).contiguous()
    keys = torch.empty(*scores.shape[:-1], k, dtype=torch.int64, device="cpu")
    if keys.numel():
        rows = keys.numel() // k
        native().largest_keys(flat.data_ptr(), rows, n, k, keys.data_ptr(), _threads(threads))
    return keys


def choose_blocks(
    scores: Tensor,
    count: int,
    *,
    own: bool,
    dense_from: Tensor | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The best blocks of every row of square maps, as lists.

    Args:
        scores: (B, H, n, n) floats, compared as float32; -inf where nothing may be kept. NaN takes
            a place and is not kept.
        count: places per row; equal scores go to the lowest block.
        own: block i of row i takes the first place, whatever its score.
        dense_from: (B,) int64, the first row of those that keep all; None for no such rows.
        threads: default `torch.get_num_threads()`; the result does not depend on it.

    Returns:
        row_ptr: (B, H, n + 1) int64, joined over batch and heads. col: int32, ascending in a row.

    Raises:
        ValueError: count is below 0, or shapes do not fit.
    """
    batch, heads, n, width = scores.shape
    if n != width or count < 0 or (dense_from is not None and dense_from.shape != (batch,)):
        raise ValueError(
            f"scores: {tuple(scores.shape)}, count={count}, dense_from: "
            f"{None if dense_from is None else tuple(dense_from.shape)}; expected (B, H, n, n), at "
            "least 0 and (B,)"
        )
    count = min(count, n)
    if scores.dtype == torch.float64 or not selects_natively(scores, dense_from):
        return choose_blocks_reference(scores, count, own=own, dense_from=dense_from)
    flat = scores.detach().to(torch.float32).contiguous()
    dense = None if dense_from is None else dense_from.to(torch.int64).contiguous()
    rows = batch * heads * n
    whole = 0 if dense is None else heads * int((n - dense).clamp_(0, n).sum())
    col = torch.empty(count * (rows - whole) + n * whole, dtype=torch.int32, device="cpu")
    row_ptr = torch.zeros(batch, heads, n + 1, dtype=torch.int64, device="cpu")
    total = native().choose_blocks(
        flat.data_ptr(),
        batch * heads,
        heads,
        n,
        count,
        own,
        address(dense),
        row_ptr.data_ptr(),
        col.data_ptr(),
        _threads(threads),
    )
    return row_ptr, col[:total]


def pool_rows(
    x: Tensor, block: int, poolings: tuple[str, ...], *, threads: int | None = None
) -> Tensor:
    """Largest, least and mean entries of blocks of rows, in one pass.

    Args:
        x: (B, H, L, D) in float32, bfloat16 or float16, without NaN; any strides but the last.
        block: rows of a block; the last one may be shorter.
        poolings: some of "max", "min" and "avg".
        threads: default `torch.get_num_threads()`; the result does not depend on it.

    Returns:
        (B, H, ceil(L / block), D * len(poolings)) float32, joined in the order max, min, avg.

    Raises:
        ValueError: `block` is below 1, or a pooling is none of these.
    """
    order = [name for name in ("max", "min", "avg") if name in poolings]
    if block < 1 or len(order) != len(poolings):
        raise ValueError(f"block={block}, poolings={poolings}: expected blocks, max, min and avg")
    if x.dtype not in _TYPES or not selects_natively(x):
        return pool_rows_reference(x, block, poolings)
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    batch, heads, length, dim = x.shape
    pooled = torch.empty(
        batch, heads, -(-length // block), dim * len(order), dtype=torch.float32, device="cpu"
    )
    places = {name: pooled.data_ptr() + 4 * dim * at for at, name in enumerate(order)}
    native().pool_rows(
        x.data_ptr(),
        *x.stride()[:3],
        _TYPES[x.dtype],
        *x.shape,
        block,
        *(places.get(name, 0) for name in ("max", "min", "avg")),
        dim * len(order),
        _threads(threads),
    )
    return pooled


def pack_codes(x: Tensor, bits: int, *, threads: int | None = None) -> tuple[Tensor, Tensor]:
    """Labels in few bits, each between its own smallest and largest channel.

    Args:
        x: (..., r) finite floats.
        bits: 8, 4 or 2; r codes fill whole bytes.
        threads: default `torch.get_num_threads()`; the result does not depend on it.

    Returns:
        (..., r * bits / 8) uint8 codes, the first channel in the lowest bits; (..., 2) float32, low
        and step.

    Raises:
        ValueError: `bits` is none of these, or bytes stay unfilled.
    """
    width = x.shape[-1]
    if bits not in _CODES or not width or width * bits % 8:
        raise ValueError(f"bits={bits} with {width} channels: expected 2, 4 or 8 and whole bytes")
    if not selects_natively(x):
        return pack_codes_reference(x, bits)
    x = x.to(torch.float32).contiguous()
    codes = torch.empty(*x.shape[:-1], width * bits // 8, dtype=torch.uint8, device="cpu")
    span = torch.empty(*x.shape[:-1], 2, dtype=torch.float32, device="cpu")
    rows = x.numel() // width
    native().pack_codes(
        x.data_ptr(), rows, width, bits, codes.data_ptr(), span.data_ptr(), _threads(threads)
    )
    return codes, span


def _threads(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else threads


def _check_labels(query: Tensor, labels: Tensor, span: Tensor | None, bits: int) -> None:
    coded = span is not None
    if bits not in ((8, 4, 2) if coded else (16,)):
        raise ValueError(f"bits={bits}: expected 8, 4 or 2 with `span`, 16 without")
    if query.dim() != 4 or labels.dim() != 4:
        raise ValueError(
            f"query {tuple(query.shape)}, labels {tuple(labels.shape)}: expected 4 dimensions"
        )
    width = labels.shape[-1] * (8 // bits if coded else 1)
    fits = query.shape[0] == labels.shape[0] and query.shape[1] % max(1, labels.shape[1]) == 0
    if not fits or width != query.shape[-1]:
        raise ValueError(
            f"labels: {tuple(labels.shape)} of {bits} bits with queries {tuple(query.shape)}, "
            "expected the same batch and channels, and heads that divide theirs"
        )
    if span is not None and (labels.dtype != torch.uint8 or span.shape != (*labels.shape[:3], 2)):
        raise ValueError(
            f"span: {tuple(span.shape)} with {labels.dtype} codes, expected "
            f"{(*labels.shape[:3], 2)} and uint8"
        )


def _label_args(
    query: Tensor, labels: Tensor, span: Tensor | None, bits: int
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The native arguments, and the tensors that must live as long."""
    batch, heads, q_len, width = query.shape
    if query.dtype is not torch.float32 or not query.is_contiguous():
        query = query.to(torch.float32).contiguous()
    labels = _dense_rows(labels)
    _, label_heads, k_len, _ = labels.shape
    label_batch, label_head, _, _ = labels.stride()
    kind, size = _TYPES.get(labels.dtype), labels.element_size()
    spans: tuple[int, ...] = (0, 0, 0)
    if span is not None:
        span = _dense_rows(span.to(torch.float32))
        kind, spans = _CODES[bits], (span.data_ptr(), *span.stride()[:2])
    args = native().LabelArgs.of(
        query.data_ptr(), width**-0.5, labels.data_ptr(), label_batch * size, label_head * size,
        kind, *spans, batch, heads, label_heads, q_len, k_len, width,
    )  # fmt: skip
    return args, (query, labels, span)


def _dense_rows(x: Tensor) -> Tensor:
    """`x` itself if its rows follow each other without gaps, else a copy."""
    return x if x.stride()[2:] == (x.shape[-1], 1) else x.contiguous()
