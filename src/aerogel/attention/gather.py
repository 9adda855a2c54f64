"""Attention on gathered keys: groups, and key lists row by row, as batched products."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aerogel.attention.call import Call
from aerogel.attention.group_plan import GroupPlan
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.plan import flat_pointers
from aerogel.attention.softmax import masked_attention
from aerogel.attention.token_plan import TokenPlan, gather_tokens, scatter_tokens

_CHUNK = 1 << 23  # gathered floats held at a time


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Attention of a GroupPlan, TokenPlan or KeyListPlan on gathered tensors.

    Returns:
        o (B, Hq, Lq, Dv) in q's type, lse (B, Hq, Lq) in the accumulator's; of a "mean" plan the
        lse is -inf or 0.

    Raises:
        ValueError: another kind of plan, or dropout.
    """
    if call.dropout_p:
        raise ValueError("dropout_p: the gather backend has no dropout; use backend='reference'")
    if isinstance(call.plan, TokenPlan):
        call = replace(call, plan=call.plan.groups(call.shape))
    if isinstance(call.plan, GroupPlan):
        return _groups(q, k, v, call, call.plan)
    if isinstance(call.plan, KeyListPlan):
        return _key_lists(q, k, v, call, call.plan)
    raise ValueError(f"plan: {type(call.plan).__name__} has no gathered form")


def gather_keys(x: Tensor, index: Tensor, q_heads: int) -> Tensor:
    """Keys (B, Hkv, L, D) at index (Bp, Hp, n): (B, Hq or Hkv, n, D), never expanding x."""
    batch, kv_heads, _, dim = x.shape
    if index.shape[1] <= kv_heads:
        return gather_tokens(x, index)
    groups = q_heads // kv_heads
    wide = x[:, :, None].expand(-1, -1, groups, -1, -1)
    at = index.long().clamp(min=0).expand(batch, -1, -1).unflatten(1, (kv_heads, groups))
    return wide.gather(3, at[..., None].expand(-1, -1, -1, -1, dim)).flatten(1, 2)


def _allowed(call: Call, rows: Tensor, keys: Tensor) -> Tensor:
    """Window and padding for broadcast (Bp, Hp, ...) rows and keys: (B or 1, ...) bool."""
    keep = torch.ones((), dtype=torch.bool, device=keys.device)
    if call.window is not None:
        keep = keep & (rows + call.shape.q_offset - keys < call.window)
    if call.key_padding is not None:
        real = keys.clamp(min=0).expand(call.shape.batch, *keys.shape[1:])
        found = call.key_padding.gather(1, real.flatten(1)).view(real.shape)
        keep = keep & found
    return keep


def _heads(x: Tensor, call: Call) -> Tensor:
    """(b, h, ...) of 1, Hkv or Hq heads to (b, Hkv, G or 1, ...)."""
    kv_heads = call.shape.kv_heads
    if x.shape[1] in (1, kv_heads):
        return x[:, :, None]
    return x.unflatten(1, (kv_heads, -1))


def _groups(q: Tensor, k: Tensor, v: Tensor, call: Call, plan: GroupPlan) -> tuple[Tensor, Tensor]:
    shape = call.shape
    n, w_q = plan.q_idx.shape[2:]
    w_k = plan.kv_idx.shape[3]
    q_idx, kv_idx = plan.q_idx.flatten(2), plan.kv_idx.flatten(2)
    queries = gather_tokens(q, q_idx).unflatten(2, (n, w_q))
    keys = gather_keys(k, kv_idx, shape.q_heads).unflatten(2, (n, w_k))
    values = gather_keys(v, kv_idx, shape.q_heads).unflatten(2, (n, w_k))
    mask = plan.group_mask(shape)
    mask = mask & _allowed(call, plan.q_idx[..., :, None].long(), plan.kv_idx[..., None, :].long())
    queries = queries.unflatten(1, (shape.kv_heads, -1))
    distance, bias = None, None
    if plan.q_rank is not None and plan.rank_keys is not None:
        distance = _heads(_distances(plan.q_rank, w_k, len(plan.rank_keys) // 2), call)
        near = queries @ plan.rank_keys.to(queries.dtype).T
        bias = near.gather(-1, distance.expand(*near.shape[:-1], -1)) * call.scale
    o, lse, p = masked_attention(
        queries,
        _heads(keys, call),
        _heads(values, call),
        _heads(mask, call),
        scale=call.scale,
        softcap=call.softcap,
        bias=bias,
    )
    if distance is not None and plan.rank_values is not None:
        weight = p.new_zeros(*p.shape[:-1], len(plan.rank_values))
        weight = weight.scatter_add(-1, distance.expand_as(p), p)
        o = o + weight @ plan.rank_values.to(p.dtype)
    o, lse = o.flatten(1, 2).flatten(2, 3), lse.flatten(1, 2).flatten(2, 3)
    o, lse = _reduce(o, lse, call, plan)
    return o.to(q.dtype), lse


def _distances(q_rank: Tensor, keys: int, most: int) -> Tensor:
    """(Bp, Hp, N, Wq, Wk) int64 rows of the tables for the distance of every slot of keys."""
    apart = torch.arange(keys, device=q_rank.device) - q_rank[..., None]
    return apart.clamp(-most, most) + most


def _reduce(o: Tensor, lse: Tensor, call: Call, plan: GroupPlan) -> tuple[Tensor, Tensor]:
    """Slots (B, Hq, N * Wq, Dv) back to rows (B, Hq, Lq, Dv)."""
    shape = call.shape
    flat = plan.q_idx.flatten(2)
    if plan.reduce == "scatter":
        owner = plan.owners(shape)
        rows = gather_tokens(o, owner)
        lse = gather_tokens(lse[..., None], owner)[..., 0]
        owner = owner.repeat_interleave(shape.q_heads // owner.shape[1], 1)
        return rows, torch.where(owner >= 0, lse, -torch.inf)
    if plan.reduce == "mean":
        filled = (~torch.isinf(lse)).to(o.dtype)[..., None]
        total = scatter_tokens(o, flat, shape.q_len)
        count = scatter_tokens(filled, flat, shape.q_len)
        lse = torch.where(count[..., 0] > 0, 0.0, -torch.inf)
        return total / count.clamp(min=1), lse
    place = torch.where(flat < 0, shape.q_len, flat).long().expand(shape.batch, -1, -1)
    place = place.repeat_interleave(shape.q_heads // place.shape[1], 1)
    top = lse.new_full((*lse.shape[:2], shape.q_len + 1), -torch.inf)
    top = top.scatter_reduce(2, place, lse.detach(), "amax")
    top = torch.where(torch.isinf(top), 0, top)
    weight = torch.exp(lse - top.gather(2, place))[..., None]
    total = scatter_tokens(weight, flat, shape.q_len)
    rows = scatter_tokens(o * weight, flat, shape.q_len)
    filled = total > 0
    safe = torch.where(filled, total, 1)
    lse = torch.where(filled[..., 0], top[..., :-1] + torch.log(safe[..., 0]), -torch.inf)
    return rows / safe, lse


def _key_lists(
    q: Tensor, k: Tensor, v: Tensor, call: Call, plan: KeyListPlan
) -> tuple[Tensor, Tensor]:
    shape = call.shape
    counts = plan.ptr.diff(dim=-1)
    longest = max(1, int(counts.max()) if counts.numel() else 1)
    heads = max(shape.kv_heads, plan.dims[1])
    width = max(1, shape.batch * heads * longest * (q.shape[-1] + v.shape[-1]))
    step = max(1, _CHUNK // width)
    starts = flat_pointers(plan.ptr)[:-1].view(counts.shape)
    outputs, lses = [], []
    for begin in range(0, shape.q_len, step):
        rows = slice(begin, min(begin + step, shape.q_len))
        lane = torch.arange(longest, device=q.device)
        inside = lane < counts[:, :, rows, None]
        at = torch.where(inside, starts[:, :, rows, None] + lane, 0)
        none = plan.idx.new_zeros(1)
        keys = torch.where(inside, torch.cat([plan.idx, none])[at].long(), -1)
        row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        mask = inside & _allowed(call, row, keys)
        if shape.causal:
            mask = mask & (keys <= row + shape.q_offset)
        size = (rows.stop - rows.start, longest)
        o, lse, _ = masked_attention(
            q[:, :, rows].unflatten(1, (shape.kv_heads, -1))[..., None, :],
            _heads(gather_keys(k, keys.flatten(2), shape.q_heads).unflatten(2, size), call),
            _heads(gather_keys(v, keys.flatten(2), shape.q_heads).unflatten(2, size), call),
            _heads(mask, call)[..., None, :],
            scale=call.scale,
            softcap=call.softcap,
        )
        outputs.append(o[..., 0, :].flatten(1, 2))
        lses.append(lse[..., 0].flatten(1, 2))
    return torch.cat(outputs, 2).to(q.dtype), torch.cat(lses, 2)
