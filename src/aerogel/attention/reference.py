"""The oracle: attention with a dense mask, on any device and type, differentiable."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aerogel.attention.bank_plan import BankPlan
from aerogel.attention.call import Call
from aerogel.attention.group_plan import GroupPlan
from aerogel.attention.lowering import lower
from aerogel.attention.softmax import accumulator, masked_attention
from aerogel.kernels.attention_reference import dropout_factors


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention by the plan's dense mask.

    Returns:
        o (B, Hq, Lq, Dv) in q's type, lse (B, Hq, Lq), probabilities (B, Hq, Lq, Lk).

    Raises:
        ValueError: the plan has no mask (banks: they run one by one), or knows ranks in groups.
    """
    if isinstance(call.plan, BankPlan):
        raise ValueError("BankPlan has no dense mask; `attend` runs its banks one by one")
    if isinstance(call.plan, GroupPlan) and call.plan.q_rank is not None:
        raise ValueError("backend='reference': a plan with q_rank runs on 'gather'")
    if isinstance(call.plan, GroupPlan) and call.plan.reduce == "mean":
        return _mean_of_groups(q, k, v, call, call.plan)
    shape = call.shape
    mask = by_group(call.mask().to(q.device), shape.q_heads, shape.kv_heads)
    bias = call.plan.bias(shape)
    keep = None
    if call.dropout_p:
        sizes = (shape.batch, shape.q_heads, shape.q_len, shape.k_len)
        keep = dropout_factors(call.dropout_p, call.seed, sizes).to(q.device)
    o, lse, p = masked_attention(
        q.unflatten(1, (shape.kv_heads, -1)),
        k[:, :, None],
        v[:, :, None],
        mask,
        scale=call.scale,
        softcap=call.softcap,
        bias=None if bias is None else by_group(bias, shape.q_heads, shape.kv_heads).to(q.device),
        keep=None if keep is None else keep.unflatten(1, (shape.kv_heads, -1)),
    )
    return o.flatten(1, 2).to(q.dtype), lse.flatten(1, 2), p.flatten(1, 2)


def _mean_of_groups(
    q: Tensor, k: Tensor, v: Tensor, call: Call, plan: GroupPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """A softmax for each group; a row gets the mean over the groups in which it sees a key."""
    total = q.new_zeros(*q.shape[:3], v.shape[-1])
    count, probabilities = q.new_zeros(q.shape[:3]), q.new_zeros(*q.shape[:3], k.shape[2])
    for n in range(plan.q_idx.shape[2]):
        one = slice(n, n + 1)
        group = GroupPlan(plan.q_idx[:, :, one], plan.kv_idx[:, :, one], mask_self=plan.mask_self)
        o, lse, p = reference_attention(q, k, v, replace(call, plan=group))
        seen = (~torch.isinf(lse)).to(o.dtype)
        total, count = total + o * seen[..., None], count + seen
        probabilities = probabilities + p * seen[..., None].to(p.dtype)
    lse = torch.where(count > 0, 0.0, -torch.inf)
    count = count.clamp(min=1)[..., None]
    return total / count, lse, probabilities / count


def by_group(x: Tensor, q_heads: int, kv_heads: int) -> Tensor:
    """(b, h, ...) with h of 1, kv_heads or q_heads to (b, 1 or kv_heads, 1 or G, ...)."""
    if x.shape[1] == 1:
        return x[:, :, None]
    if x.shape[1] == kv_heads:
        return x[:, :, None]
    return x.unflatten(1, (kv_heads, q_heads // kv_heads))


def pooled_probabilities(q: Tensor, k: Tensor, call: Call, lse: Tensor, block: int) -> Tensor:
    """Largest probability of every block x block tile: (B, Hq, nQ, nK), row strip by row strip.

    Args:
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lk, D).
        call: of a plan with key ranges and without a bias.
        lse: (B, Hq, Lq) of the same call.
        block: rows and keys of a tile.
    """
    shape, kind = call.shape, accumulator(q.dtype)
    streams = lower(call.plan.passes(shape), shape, call.window)
    if any(stream.tile_bias is not None for stream in streams):
        raise ValueError("pool_blocks: expected a plan without tile_bias")
    n_k = -(-shape.k_len // block)
    strips = []
    for begin in range(0, shape.q_len, block):
        rows = slice(begin, min(begin + block, shape.q_len))
        strip = q[:, :, rows].unflatten(1, (shape.kv_heads, -1)).to(kind)
        s = torch.matmul(strip, k[:, :, None].to(kind).transpose(-1, -2)) * call.scale
        s = s.flatten(1, 2)
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        p = torch.exp(s - torch.where(torch.isinf(lse), 0, lse)[:, :, rows, None])
        kept = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
        for stream in streams:
            mask = stream.strip_mask(shape, rows)
            kept = kept | mask.repeat_interleave(shape.q_heads // mask.shape[1], 1)
        kept = kept.to(p.device)
        if call.key_padding is not None:
            kept = kept & call.key_padding[:, None, None]
        p = p.masked_fill(~kept, 0)
        padded = torch.nn.functional.pad(p, (0, n_k * block - shape.k_len))
        strips.append(padded.unflatten(-1, (n_k, block)).amax((2, 4)))
    return torch.stack(strips, 2)
