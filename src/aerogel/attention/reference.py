"""The oracle: attention with a dense mask, on any device and type, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.attention.bank_plan import BankPlan
from aerogel.attention.call import Call
from aerogel.attention.plan import Plan
from aerogel.attention.softmax import accumulator, dropout_factors, masked_attention


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention by the plan's dense mask.

    Returns:
        o (B, Hq, Lq, Dv) in q's type, lse (B, Hq, Lq), probabilities (B, Hq, Lq, Lk).

    Raises:
        ValueError: the plan has no mask (banks: they run one by one).
    """
    if isinstance(call.plan, BankPlan):
        raise ValueError("BankPlan has no dense mask; `attend` runs its banks one by one")
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
        call: a dense call.
        lse: (B, Hq, Lq) of the same call.
        block: rows and keys of a tile.
    """
    shape, kind = call.shape, accumulator(q.dtype)
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
        p = p.masked_fill(~_strip_mask(call, rows), 0)
        padded = torch.nn.functional.pad(p, (0, n_k * block - shape.k_len))
        strips.append(padded.unflatten(-1, (n_k, block)).amax((2, 4)))
    return torch.stack(strips, 2)


def _strip_mask(call: Call, rows: slice) -> Tensor:
    """The mask of some rows under dense attention: causal rule, window and padding."""
    shape = call.shape
    position = shape.positions()[rows, None]
    j = torch.arange(shape.k_len)
    mask = torch.ones(position.shape[0], shape.k_len, dtype=torch.bool)
    if shape.causal:
        mask &= j <= position
    if call.window is not None:
        mask &= position - j < call.window
    if call.key_padding is None:
        return mask[None, None]
    return mask[None, None].to(call.key_padding.device) & call.key_padding[:, None, None]


def plan_head(plan: Plan, head: int, q_heads: int) -> int:
    """The plan's head that serves a query head."""
    return head * plan.dims[1] // q_heads
