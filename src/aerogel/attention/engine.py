"""`attend`: exact attention over any plan, the one entry for vision and language models.

Paper: the online softmax is Milakov and Gimelshein, arXiv 1805.02867; its tiling is Dao et al.,
FlashAttention, arXiv 2205.14135. Only the choice of pairs is sparse: over the pairs of a plan the
softmax is exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from aerogel.attention.bank_plan import BankPlan
from aerogel.attention.call import Call, check_call, check_tensors
from aerogel.attention.gather import gathered_attention
from aerogel.attention.group_plan import GroupPlan
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.mix_plan import HeadMixPlan
from aerogel.attention.ops import tile_attention
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.primitives import plan_pairs, sddmm, spmm
from aerogel.attention.reference import pooled_probabilities, reference_attention
from aerogel.attention.shape import AttentionShape
from aerogel.attention.softmax import accumulator, apply_sink, merge
from aerogel.attention.token_plan import (
    TokenPlan,
    batch_as_heads,
    gather_tokens,
    heads_as_batch,
    scatter_tokens,
)
from aerogel.kernels import native_available, reference_mode

Backend = Literal["auto", "native", "reference", "sdpa", "gather", "flex"]
BACKENDS = ("auto", "native", "reference", "sdpa", "gather", "flex")


class Attended(NamedTuple):
    """What `attend` returns when more than the output is asked for; the rest is None.

    Attributes:
        output: (B, Hq, Lq, Dv).
        lse: (B, Hq, Lq), natural logarithm.
        pooled: (B, Hq, nQ, nK), largest probability of each tile.
        probs: (B, Hq, Lq, Lk), reference backend only.
    """

    output: Tensor
    lse: Tensor | None = None
    pooled: Tensor | None = None
    probs: Tensor | None = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: Plan | None = None,
    scale: float | None = None,
    normalizer: Literal["softmax", "relu", "none"] = "softmax",
    causal: bool = False,
    q_offset: int | None = None,
    key_padding: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_probs: bool = False,
    pool_blocks: int | None = None,
    backend: Backend = "auto",
    validate: bool = True,
) -> Tensor | Attended:
    """Attention of q over the keys that `plan` names.

    Args:
        q: (B, Hq, Lq, D); query head h uses key head ``h * Hkv // Hq``.
        k: (B, Hkv, Lk, D); never expanded to Hq heads.
        v: (B, Hkv, Lk, Dv).
        plan: which keys each query reads; default all.
        scale: factor of the logits, default ``D ** -0.5``.
        normalizer: "softmax", or "relu" (``max(s, 0)``) or "none" (s itself) without a sum of one.
        causal: a query reads no key behind its own position.
        q_offset: position of the first query, default ``Lk - Lq``.
        key_padding: (B, Lk) bool, True at real keys.
        window: a query at p reads keys j with ``p - j < window`` only.
        softcap: logits s become ``softcap * tanh(s / softcap)``.
        sink_logit: (Hq,) logits that take weight and give nothing.
        dropout_p: probability of dropping a weight; a reproducible draw from torch's generator.
        return_lse: also return the natural log-sum-exp.
        return_probs: also return the probabilities; "reference" only.
        pool_blocks: side of tiles whose largest probability is returned; plans with key
            ranges only.
        backend: "native" (CPU kernels), "reference" (a dense mask), "sdpa" (dense plans), "gather"
            (groups and lists), "flex" (CUDA), or "auto". All give the same result.
        validate: check the plan against the tensors; False in hot loops.

    Returns:
        (B, Hq, Lq, Dv) in q's type, or `Attended` if more was asked for. A row without keys is 0.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    check_tensors(q, k, v)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
    plan = DensePlan() if plan is None else plan
    shape = plan.shaped(AttentionShape.of(q, k, causal=causal, offset=q_offset))
    seed = int(torch.randint(1 << 31, ())) if dropout_p else 0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = Call(shape, plan, scale, window, key_padding, softcap, dropout_p, seed)
    check_call(call, sink_logit)
    if validate:
        plan.validate(shape)
    if normalizer != "softmax":
        return _unnormalized(q, k, v, call, normalizer, sink_logit)
    probs = None
    if return_probs:
        if backend != "reference" or sink_logit is not None:
            raise ValueError("return_probs: expected backend='reference' and no sink_logit")
        o, lse, probs = reference_attention(q, k, v, call)
    else:
        need_lse = return_lse or sink_logit is not None or pool_blocks is not None
        o, lse = _run(q, k, v, call, backend, need_lse)
    if sink_logit is not None:
        o, lse = apply_sink(o, lse, sink_logit)
    if not (return_lse or return_probs or pool_blocks):
        return o
    pooled = None
    if pool_blocks is not None:
        if isinstance(plan, (BankPlan, GroupPlan, TokenPlan)):
            raise ValueError(f"pool_blocks: {type(plan).__name__} has no key ranges")
        pooled = pooled_probabilities(q, k, call, lse, pool_blocks)
    return Attended(o, lse, pooled, probs)


sparse_attention = attend


def attend_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`attend` with the log-sum-exp, as a pair that `merge` takes."""
    result = attend(q, k, v, return_lse=True, **options)
    assert isinstance(result, Attended)
    assert result.lse is not None
    return result.output, result.lse


def _run(
    q: Tensor, k: Tensor, v: Tensor, call: Call, backend: str, need_lse: bool
) -> tuple[Tensor, Tensor]:
    plan = call.plan
    if isinstance(plan, BankPlan):
        return _banks(q, k, v, call, plan, backend)
    if backend == "auto":
        backend = _choose(q, call, need_lse)
    if isinstance(plan, TokenPlan) and backend == "gather" and _is_dense_inside(call, plan):
        return _tokens(q, k, v, call, plan)
    if isinstance(plan, HeadMixPlan) and plan.gathered() and backend != "reference":
        return _mixed(q, k, v, call, plan)
    if backend == "sdpa":
        return _sdpa(q, k, v, call), q.new_empty(0)
    if backend == "gather":
        return gathered_attention(q, k, v, call)
    if backend == "flex":
        from aerogel.attention.gpu import flex_attend

        return flex_attend(q, k, v, call)
    if backend == "native":
        return _native(q, k, v, call)
    o, lse, _ = reference_attention(q, k, v, call)
    return o, lse


def _choose(q: Tensor, call: Call, need_lse: bool) -> str:
    """The fastest backend that gives this call's result."""
    plan, shape = call.plan, call.shape
    if isinstance(plan, (GroupPlan, TokenPlan)) and not call.dropout_p:
        return "gather"  # a group may read a pair twice, which no mask can say
    if reference_mode() or (call.dropout_p and _drops_by_place(plan)):
        return "reference"
    native = q.is_cpu and native_available() and q.dtype != torch.float64
    if call.dropout_p:
        return "native" if native else "reference"
    if isinstance(plan, DensePlan) and not need_lse and call.softcap is None:
        plain = call.window is None and call.key_padding is None
        if plain and (not shape.causal or shape.q_len == shape.k_len or shape.q_len == 1):
            return "sdpa"
        if not native:
            return "sdpa"
    if native:
        return "native"
    if isinstance(plan, KeyListPlan):
        return "gather"
    if q.is_cuda and not isinstance(plan, HeadMixPlan):
        return "flex"
    return "reference"


def _drops_by_place(plan: Plan) -> bool:
    """Whether a kernel would see tokens or heads elsewhere than dropout's counter has them."""
    moved = any(getattr(plan, name, None) is not None for name in ("q_perm", "k_perm"))
    mixed = isinstance(plan, HeadMixPlan) and plan.gathered()
    return moved or mixed or isinstance(plan, (GroupPlan, TokenPlan))


def _native(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Lowered tiles; several passes share one softmax."""
    if isinstance(call.plan, (GroupPlan, TokenPlan)):
        raise ValueError(f"backend='native': {type(call.plan).__name__} runs on 'gather'")
    if call.dropout_p and _drops_by_place(call.plan):
        raise ValueError(
            f"dropout_p: {type(call.plan).__name__} moves tokens or heads; use backend='reference'"
        )
    q_perm, k_perm = getattr(call.plan, "q_perm", None), getattr(call.plan, "k_perm", None)
    if (q_perm is not None or k_perm is not None) and (call.shape.causal or call.window):
        raise ValueError("plan: permuted tokens have no causal rule on backend='native'")
    padding = call.key_padding
    if q_perm is not None:
        q = q.index_select(2, q_perm)
    if k_perm is not None:
        k, v = k.index_select(2, k_perm), v.index_select(2, k_perm)
        padding = None if padding is None else padding.index_select(1, k_perm)
    parts = [
        tile_attention(
            q, k, v, stream, call.shape,
            scale=call.scale, key_padding=padding, softcap=call.softcap,
            dropout_p=call.dropout_p, seed=call.seed,
        )
        for stream in call.plan.streams(call.shape, call.window)
    ]  # fmt: skip
    o, lse = parts[0] if len(parts) == 1 else merge(parts)
    if q_perm is not None:
        back = torch.argsort(q_perm)
        o, lse = o.index_select(2, back), lse.index_select(2, back)
    return o, lse


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """torch's own attention; a mask only where the call needs one."""
    if not isinstance(call.plan, DensePlan) or call.softcap is not None or call.dropout_p:
        raise ValueError(
            f"backend='sdpa': expected a dense plan without softcap and dropout, got "
            f"{type(call.plan).__name__}"
        )
    shape = call.shape
    grouped = shape.q_heads != shape.kv_heads
    plain = call.window is None and call.key_padding is None
    square = shape.q_offset == 0 and shape.q_len == shape.k_len
    last = shape.q_offset + 1 >= shape.k_len  # every query sees all keys
    if plain and (square or last or not shape.causal):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=shape.causal and not last, scale=call.scale, enable_gqa=grouped
        )
    mask = call.mask().to(q.device)
    empty = ~mask.any(-1, keepdim=True)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask | empty, scale=call.scale, enable_gqa=grouped
    )
    return out.masked_fill(empty, 0)


def _banks(
    q: Tensor, k: Tensor, v: Tensor, call: Call, plan: BankPlan, backend: str
) -> tuple[Tensor, Tensor]:
    parts = []
    for bank in plan.banks:
        keys, values = (k, v) if bank.k is None or bank.v is None else (bank.k, bank.v)
        raw = bank.k is None
        part = replace(
            call,
            plan=bank.plan,
            shape=bank.shape(call.shape),
            window=call.window if raw else None,
            key_padding=call.key_padding if raw else bank.padding,
        )
        parts.append(_run(q, keys, values, part, backend, True))
    return merge(parts)


def _is_dense_inside(call: Call, plan: TokenPlan) -> bool:
    """Whether the chosen tokens attend among themselves as a shorter sequence would."""
    shape = call.shape
    same = shape.q_offset == 0 and shape.q_len == shape.k_len
    return plan.side == "both" and same and call.window is None and not call.dropout_p


def _tokens(q: Tensor, k: Tensor, v: Tensor, call: Call, plan: TokenPlan) -> tuple[Tensor, Tensor]:
    """Gathers the tokens once, attends among them, puts the rows back."""
    heads = plan.dims[1]
    slots = plan.slots().expand(call.shape.batch, -1, -1).flatten(0, 1)
    real = slots >= 0
    if call.key_padding is not None:
        known = call.key_padding.repeat_interleave(heads, 0)
        real = real & known.gather(1, slots.clamp(min=0).long())
    q, k, v = (gather_tokens(heads_as_batch(t, heads), slots[:, None]) for t in (q, k, v))
    short = AttentionShape.of(q, k, causal=call.shape.causal)
    padding = None if bool(real.all()) else real
    part = replace(call, plan=DensePlan(), shape=short, key_padding=padding)
    o, lse = _run(q, k, v, part, "auto", True)
    index = slots[:, None]
    lse = lse.masked_fill(~real[:, None] & (index < 0), -torch.inf)
    rows = scatter_tokens(o, index, call.shape.q_len)
    owner = lse.new_full((*lse.shape[:2], call.shape.q_len + 1), -torch.inf)
    place = torch.where(index < 0, call.shape.q_len, index).long().expand_as(lse)
    lse = owner.scatter(2, place, lse)[..., :-1]
    return batch_as_heads(rows, heads), batch_as_heads(lse, heads)


def _mixed(q: Tensor, k: Tensor, v: Tensor, call: Call, plan: HeadMixPlan) -> tuple[Tensor, Tensor]:
    """Heads on gathered groups one plan at a time, the others together."""
    shape = call.shape
    kind = accumulator(q.dtype)
    o = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=kind)
    for heads, part in plan.parts:
        index = torch.tensor(heads, device=q.device)
        shared = index * shape.kv_heads // shape.q_heads
        keys, values = k.index_select(1, shared), v.index_select(1, shared)
        sub = replace(call, plan=part, shape=plan.part_shape(heads, shape))
        part_o, part_lse = _run(q.index_select(1, index), keys, values, sub, "auto", True)
        o = o.index_copy(1, index, part_o)
        lse = lse.index_copy(1, index, part_lse.to(kind))
    return o, lse


def _unnormalized(
    q: Tensor, k: Tensor, v: Tensor, call: Call, normalizer: str, sink_logit: Tensor | None
) -> Tensor:
    """Weights that are the logits themselves, or their positive part."""
    if normalizer not in ("relu", "none"):
        raise ValueError(f"normalizer={normalizer!r}: expected 'softmax', 'relu' or 'none'")
    extras = (call.window, call.softcap, sink_logit, call.plan.bias(call.shape))
    if any(extra is not None for extra in extras) or call.dropout_p:
        raise ValueError(
            f"normalizer={normalizer!r}: expected no window, softcap, sink, bias and dropout"
        )
    pairs = plan_pairs(call.plan, call.shape, call.key_padding)
    values = sddmm(q, k, pairs) * call.scale
    if normalizer == "relu":
        values = values.relu()
    return spmm(values, v, pairs).to(q.dtype)
