"""Attention over lists of keys: every tile of queries names the keys it reads, in one softmax.

The list is a stream of tiles (`TileStream`), which `attention_lower.py` makes from what a selector
chose. Keys and values are read where they are, those of a group of query heads once for all of
them, and nothing of size queries x keys is ever stored. One to a few queries take a kernel of their
own, which cuts a long list into parts and merges them.

Reference: Dao, Fu, Ermon, Rudra, Ré, FlashAttention, arXiv 2205.14135 (one pass over tiles of keys,
and probabilities computed again in the backward pass); csrc/attention.h describes the kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels._calls import address
from aerogel.kernels._library import native, native_in_use
from aerogel.kernels.attention_call import AttentionCall, unit_rows
from aerogel.kernels.attention_kept import call_key, keep_forward, kept_forward
from aerogel.kernels.attention_reference import (
    attention_backward_reference,
    attention_forward_reference,
)

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PAD = 16  # floats: rows of key gradients are whole cache lines


def attention_forward(
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
    """Softmax attention of every query over the keys that its tile names.

    Native for float32, bfloat16 and float16 on the CPU; everything else, and
    `AEROGEL_KERNELS=reference`, takes the torch reference. Sums are float32. No autograd: see
    `attention_backward`.

    Args:
        q: (B, Hq, Lq, D); any strides, but the last must be 1 (else it is copied), D at most 256.
        k: (B, Hkv, Lk, D), Hq a multiple of Hkv: query head h reads key head ``h // (Hq / Hkv)``.
        v: (B, Hkv, Lk, Dv).
        tile_ptr: (R + 1,) int64, R = Bp * Hp * ceil(Lq / block_q): the tiles of each query tile.
        kind: (T,) uint8. Bit 0 (EDGE): causal rule and window apply to each query; bit 1 (GATHER):
            `start` points into `gather_idx`; bit 2: of the two the causal rule alone applies.
        start: (T,) int32, first key, or first entry of `gather_idx`.
        length: (T,) int16, keys, at most 64. No key may appear twice in a query tile.
        gather_idx: int32 keys.
        tile_bias: (T,) float32 added to the logits of a tile, before the cap.
        Bp: batch dimension of the stream, 1 or B.
        Hp: its head dimension, 1, Hkv or Hq.
        block_q: queries in a query tile, at most 512.
        q_offset: position of the first query, default ``Lk - Lq``; key j has position j.
        scale: of the logits, default ``D ** -0.5``.
        causal: in EDGE tiles a query reads keys up to its own position.
        window: in EDGE tiles it reads keys with ``position - key < window``. Or (Hp,) int64, 0 for
            none.
        window_block: windows count blocks of so many tokens: ``position // window_block - key //
            window_block < window``.
        key_padding: (B, Lk) bool, False where a key takes no part, whatever the tile.
        softcap: logits become ``softcap * tanh(logit / softcap)``.
        sink_logit: (Hq,) float32, an additional logit without a value.
        linear: weights are the scaled products themselves, not their softmax: o is the sum of
            weights times values, and lse the sum of weights.
        dropout_p: probability of dropping a weight from o; the others grow by ``1 / (1 - p)``.
        seed: with batch element, head, query and key it decides what is dropped, by
            `dropout_factors`.
        threads: default `torch.get_num_threads()`; the result does not depend on it.

    Returns:
        o: (B, Hq, Lq, Dv) in q's dtype, with the heads inside of the rows if q has them there;
        zeros for a query without keys. lse: (B, Hq, Lq) float32, natural logarithm of the sum of
        exponentials, `sink_logit` included; -inf without any.

    Raises:
        ValueError: shapes, dtypes or sizes do not fit, or a tile leaves the keys.
    """
    key = None
    if tile_bias is key_padding is sink_logit is None and not linear and not dropout_p:
        options = (Bp, Hp, block_q, q_offset, scale, causal, window, window_block, softcap)
        key = call_key(q, k, v, options)
        kept = kept_forward(key)
        stream = (tile_ptr, kind, start, length, gather_idx)
        result = None if kept is None else kept.run(q, k, v, stream, threads)
        if result is not None:
            return result
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
    if not _native(call):
        return attention_forward_reference(
            q,
            k,
            v,
            tile_ptr,
            kind,
            start,
            length,
            gather_idx,
            tile_bias,
            Bp=Bp,
            Hp=Hp,
            block_q=block_q,
            q_offset=q_offset,
            scale=scale,
            causal=causal,
            window=window,
            window_block=window_block,
            key_padding=key_padding,
            softcap=softcap,
            sink_logit=sink_logit,
            linear=linear,
            dropout_p=dropout_p,
            seed=seed,
        )
    o = _like_rows(call.q, call.v.shape[-1])
    lse = torch.empty(call.q.shape[:3], dtype=torch.float32, device="cpu")
    args = _arguments(call)
    args.o(o.data_ptr(), *o.stride()[:3])
    args.lse(lse.data_ptr())
    args.forward(call.threads)
    if key is not None:
        keep_forward(key, args, call, (q, k, v), o)
    return o, lse


def attention_backward(
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
    """The gradients of `attention_forward`.

    The gradient of `sink_logit` needs no pass over the keys: it is the sum over a head's queries of
    ``-exp(sink_logit - lse) * (rowsum(do * o) - dlse)``.

    Args:
        q: queries, as all up to `tile_bias` and from `Bp` on what `attention_forward` got.
        k: keys.
        v: values.
        tile_ptr: tiles of each query tile.
        kind: of each tile.
        start: of each tile.
        length: of each tile.
        gather_idx: keys of GATHER tiles.
        tile_bias: of each tile, or None.
        o: what `attention_forward` returned.
        lse: what it returned besides.
        do: (B, Hq, Lq, Dv), gradient of o.
        dlse: (B, Hq, Lq), gradient of lse, or None.
        Bp: batch dimension of the stream.
        Hp: its head dimension.
        block_q: queries in a query tile.
        q_offset: position of the first query.
        scale: of the logits.
        causal: whether EDGE tiles obey the causal rule.
        window: of EDGE tiles.
        window_block: tokens in a unit of windows.
        key_padding: False where a key takes no part.
        softcap: of the logits.
        sink_logit: (Hq,).
        linear: weights are the products themselves.
        dropout_p: what the forward pass had.
        seed: the same.
        threads: default `torch.get_num_threads()`; the result does not depend on it.

    Returns:
        dq, dk and dv in the dtypes of q, k and v; (T,) float32 gradient of `tile_bias`, or None.

    Raises:
        ValueError: as `attention_forward`.
    """
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
    call.check_results(o, lse, do, dlse)
    if not _native(call):
        return attention_backward_reference(
            q,
            k,
            v,
            tile_ptr,
            kind,
            start,
            length,
            gather_idx,
            tile_bias,
            o,
            lse,
            do,
            dlse,
            Bp=Bp,
            Hp=Hp,
            block_q=block_q,
            q_offset=q_offset,
            scale=scale,
            causal=causal,
            window=window,
            window_block=window_block,
            key_padding=key_padding,
            softcap=softcap,
            sink_logit=sink_logit,
            linear=linear,
            dropout_p=dropout_p,
            seed=seed,
        )
    o, do = unit_rows(o), unit_rows(do.to(q.dtype))
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
    dq = _like_rows(call.q, call.q.shape[-1])
    dk, dv = (_key_gradient(x) for x in (call.k, call.v))
    args = _arguments(call)
    args.o(o.data_ptr(), *o.stride()[:3])
    args.grad_o(do.data_ptr(), *do.stride()[:3])
    args.grad_q(dq.data_ptr(), *dq.stride()[:3])
    args.lse(lse.data_ptr())
    dbias = None if tile_bias is None else lse.new_zeros(args.bias_copies(), kind.numel())
    args.grads(address(dlse), dk.data_ptr(), dv.data_ptr(), address(dbias))
    args.backward(call.threads)
    dim, value_dim = call.k.shape[-1], call.v.shape[-1]
    return (
        dq,
        dk[..., :dim].to(k.dtype),
        dv[..., :value_dim].to(v.dtype),
        None if dbias is None else dbias.sum(0),
    )


def prepared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stream: tuple[Tensor, ...],
    *,
    Bp: int,
    Hp: int,
    block_q: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[Any, Any]:
    """`attention_forward` on the same keys again and again, for queries of the same strides.

    Args:
        q: (B, Hq, Lq, D) with unit last stride.
        k: keys, as the rest down to `softcap` what `attention_forward` takes.
        v: values.
        stream: tile_ptr, kind, start, length and gather_idx.
        Bp: batch dimension of the stream.
        Hp: its head dimension.
        block_q: queries in a query tile.
        scale: of the logits.
        softcap: of the logits.

    Returns:
        The native call, whose ``step(q, o, lse, threads)`` takes addresses of q, of o (B, Hq, Lq,
        Dv) and of lse (B, Hq, Lq) float32, both contiguous; and what must live as long as it.

    Raises:
        ValueError: as `attention_forward`.
    """
    call = AttentionCall.of(
        q,
        k,
        v,
        (*stream, None),
        plan=(Bp, Hp, block_q),
        rules=(None, scale, False, None, 1, None, softcap, None),
    )
    args = _arguments(call)
    rows, dim = q.shape[2], v.shape[-1]
    args.o(0, q.shape[1] * rows * dim, rows * dim, dim)
    return args, call


def _native(call: AttentionCall) -> bool:
    known = call.q.is_cpu and call.q.dtype in _TYPES
    return known and native_in_use() is not None


def _like_rows(q: Tensor, dim: int) -> Tensor:
    """A new (B, H, L, dim), with heads inside of rows if q has them so."""
    batch, heads, rows, own = q.shape
    if dim == own and q.is_contiguous():
        return torch.empty_like(q)
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, rows, heads, dim).transpose(1, 2)
    return q.new_empty(batch, heads, rows, dim)


def _key_gradient(x: Tensor) -> Tensor:
    padded = -(-x.shape[-1] // _PAD) * _PAD
    return torch.empty(*x.shape[:3], padded, dtype=torch.float32, device="cpu")


def _arguments(call: AttentionCall) -> Any:
    """The native call, but for the results."""
    q, k, v, stream = call.q, call.k, call.v, call.stream
    args = native().AttendArgs()
    batch, q_heads, q_len, dim = q.shape
    _, kv_heads, k_len, value_dim = v.shape
    args.sizes(_TYPES[q.dtype], batch, q_heads, kv_heads, q_len, k_len, dim, value_dim)
    args.q(q.data_ptr(), *q.stride()[:3])
    args.k(k.data_ptr(), *k.stride()[:3])
    args.v(v.data_ptr(), *v.stride()[:3])
    args.stream(*map(address, stream), *call.plan, stream[1].numel(), stream[4].numel())
    args.rules(
        call.q_offset,
        call.scale,
        call.causal,
        address(call.window),
        call.window_block,
        address(call.key_padding),
        call.softcap,
        address(call.sink_logit),
    )
    if call.linear:
        args.linear()
    if call.dropout_p:
        below = min(math.ceil(call.dropout_p * (1 << 32)), (1 << 32) - 1)
        args.dropout(call.seed, below, 1 / (1 - call.dropout_p))
    return args
