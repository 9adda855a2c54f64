"""References of the attention kernels: a dense mask and torch, for any dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.kernels.attention_call import EDGE, GATHER, NO_WINDOW, AttentionCall


def attention_forward_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_ptr: Tensor,
    kind: Tensor,
    start: Tensor,
    length: Tensor,
    gather_idx: Tensor,
    tile_bias: Tensor | None = None,
    *,
    Bp: int,
    Hp: int,
    block_q: int,
    q_offset: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | Tensor | None = None,
    window_block: int = 1,
    key_padding: Tensor | None = None,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
    linear: bool = False,
    dropout_p: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_forward` with every logit in memory; differentiable in q, k, v and biases."""
    call = AttentionCall.of(
        q,
        k,
        v,
        (tile_ptr, kind, start, length, gather_idx, tile_bias),
        plan=(Bp, Hp, block_q),
        rules=(q_offset, scale, causal, window, window_block, key_padding, softcap, sink_logit),
        weights=(linear, dropout_p, seed),
        threads=threads,
    )
    logits, allowed, _ = _logits(call, q, k, tile_bias)
    values = _expanded(v, q.shape[1]).to(logits.dtype)
    if linear:
        weights = logits.masked_fill(~allowed, 0.0)
        o = (weights * _kept(call, weights)) @ values
        return o.to(q.dtype), weights.sum(-1)
    logits = logits.masked_fill(~allowed, -torch.inf)
    if sink_logit is not None:
        sink = sink_logit.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        lse = torch.cat([logits, sink], -1).logsumexp(-1)
    else:
        lse = logits.logsumexp(-1)
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    p = (logits - shift[..., None]).exp()
    o = (p * _kept(call, p)) @ values
    return o.to(q.dtype), lse.to(_wide(torch.float32, q.dtype))


def attention_backward_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_ptr: Tensor,
    kind: Tensor,
    start: Tensor,
    length: Tensor,
    gather_idx: Tensor,
    tile_bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None = None,
    *,
    Bp: int,
    Hp: int,
    block_q: int,
    q_offset: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | Tensor | None = None,
    window_block: int = 1,
    key_padding: Tensor | None = None,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
    linear: bool = False,
    dropout_p: float = 0.0,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`attention_backward` with every logit in memory."""
    call = AttentionCall.of(
        q,
        k,
        v,
        (tile_ptr, kind, start, length, gather_idx, tile_bias),
        plan=(Bp, Hp, block_q),
        rules=(q_offset, scale, causal, window, window_block, key_padding, softcap, sink_logit),
        weights=(linear, dropout_p, seed),
        threads=threads,
    )
    logits, allowed, tile_of = _logits(call, q, k, tile_bias)
    wide = logits.dtype
    grad, heads = do.to(wide), q.shape[1]
    kept = _kept(call, logits)
    if linear:
        p, slope = logits.masked_fill(~allowed, 0.0), allowed.to(wide)
        delta = torch.zeros_like(p[..., 0])
    else:
        shift = lse.to(wide).masked_fill(lse == -torch.inf, 0.0)
        p = (logits.masked_fill(~allowed, -torch.inf) - shift[..., None]).exp()
        slope, delta = p, (grad * o.to(wide)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(wide)
    ds = slope * (kept * (grad @ _expanded(v, heads).to(wide).mT) - delta[..., None])
    if softcap is not None:
        ds = ds * (1 - (logits / softcap) ** 2)
    dq = call.scale * ds @ _expanded(k, heads).to(wide)
    dk = call.scale * _grouped(ds.mT @ q.to(wide), k.shape[1])
    dv = _grouped((p * kept).mT @ grad, k.shape[1])
    dbias = None
    if tile_bias is not None:
        dbias = torch.zeros(kind.numel(), dtype=wide, device=q.device)
        held = allowed & (tile_of >= 0)
        dbias.index_add_(0, tile_of.expand_as(held)[held], ds[held])
        dbias = dbias.to(_wide(torch.float32, q.dtype))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def dropout_factors(p: float, seed: int, shape: tuple[int, int, int, int]) -> Tensor:
    """Factors 0 or 1 / (1 - p) that depend only on (seed, b, h, i, j): (B, H, Lq, Lk) float32."""
    sizes = [torch.arange(n, dtype=torch.int64) for n in shape]
    h = torch.full((1, 1, 1, 1), seed & 0xFFFFFFFF, dtype=torch.int64)
    for axis, index in enumerate(sizes):
        view = [1, 1, 1, 1]
        view[axis] = -1
        h = _mixed((h ^ index.view(view)) + 0x9E3779B9)
    uniform = h.double() / float(1 << 32)
    return (uniform >= p).float() / (1 - p)


def _mixed(h: Tensor) -> Tensor:
    """A bijection of 32 bits with full avalanche (Murmur3's finaliser), on int64."""
    h = h & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


def _kept(call: AttentionCall, like: Tensor) -> Tensor:
    """Factors of the weights."""
    if not call.dropout_p:
        return like.new_ones(())
    sizes = (*call.q.shape[:3], call.k.shape[2])
    return dropout_factors(call.dropout_p, call.seed, sizes).to(like)


def _wide(dtype: torch.dtype, own: torch.dtype) -> torch.dtype:
    return torch.float64 if own is torch.float64 else dtype


def _expanded(x: Tensor, heads: int) -> Tensor:
    """(B, Hkv, L, D) -> (B, Hq, L, D): a copy for every query head."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Sums over the query heads of a group."""
    return x.unflatten(1, (kv_heads, -1)).sum(2)


def _logits(
    call: AttentionCall, q: Tensor, k: Tensor, tile_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, Hq, Lq, Lk), which are allowed, and the tile of each (-1 for none)."""
    heads = q.shape[1]
    wide = _wide(torch.float32, q.dtype)
    logits = call.scale * (q.to(wide) @ _expanded(k, heads).to(wide).mT)
    tile_of = _tile_of(call)
    kinds = call.stream[1].long()
    if kinds.numel():
        kind_of = kinds[tile_of.clamp(min=0)]
        if tile_bias is not None:
            added = tile_bias.to(wide)[tile_of.clamp(min=0)]
            logits = logits + torch.where(tile_of >= 0, added, 0.0)
    else:
        kind_of = torch.zeros_like(tile_of)
    if call.softcap:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    allowed = (tile_of >= 0) & _by_position(call, kind_of)
    if call.key_padding is not None:
        allowed = allowed & call.key_padding[:, None, None, :]
    return logits, allowed.expand_as(logits), tile_of


def _tile_of(call: AttentionCall) -> Tensor:
    """The tile that names each (query, key), -1 for none: (Bp, Hq or 1, Lq, Lk) int64."""
    batch, heads, block_q = call.plan
    tile_ptr, _, start, length, gather_idx, _ = call.stream
    q_len, k_len, device = call.q.shape[2], call.k.shape[2], call.q.device
    rows = tile_ptr.numel() - 1
    tiles = torch.arange(length.numel(), device=device)
    tile = tiles.repeat_interleave(length.long())
    first = length.long().cumsum(0) - length.long()
    key = start.long()[tile] + torch.arange(tile.numel(), device=device) - first[tile]
    if gather_idx.numel():
        gathers = (call.stream[1].long()[tile] & GATHER) != 0
        key = torch.where(gathers, gather_idx.long()[key.clamp(max=gather_idx.numel() - 1)], key)
    row = torch.arange(rows, device=device).repeat_interleave(tile_ptr.diff())[tile]
    by_row = torch.full((rows, k_len), -1, dtype=torch.int64, device=device)
    by_row[row, key] = tile
    by_tile = by_row.view(batch, heads, rows // (batch * heads), k_len)
    by_query = by_tile.repeat_interleave(block_q, 2)[:, :, :q_len]
    return by_query if heads == 1 else _expanded(by_query, call.q.shape[1])


def _by_position(call: AttentionCall, kind_of: Tensor) -> Tensor:
    """Where causal rule and window leave a key, given the kind of tile that names it."""
    device = call.q.device
    position = call.q_offset + torch.arange(call.q.shape[2], device=device)[:, None]
    key = torch.arange(call.k.shape[2], device=device)
    free = (kind_of & EDGE) == 0
    allowed = torch.ones_like(free)
    if call.causal:
        allowed &= free | (key <= position)
    if call.window is not None:
        unit = call.window_block
        blocks = position.div(unit, rounding_mode="floor") - key // unit
        window = call.window[None, :, None, None]
        if call.plan[1] != 1:
            window = _expanded(window, call.q.shape[1])
        inside = (blocks < window) | (window <= 0)
        allowed &= free | ((kind_of & NO_WINDOW) != 0) | inside
    return allowed
