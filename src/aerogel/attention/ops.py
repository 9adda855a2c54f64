"""`torch.ops.aerogel.attention`: the tile kernels as PyTorch operators, with gradients.

q, k, v, o and lse are saved for the backward pass, never probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aerogel.attention.lowering import TileStream
from aerogel.attention.shape import AttentionShape
from aerogel.kernels import attention_backward, attention_forward


def attention_now(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_ptr: Tensor,
    kind: Tensor,
    start: Tensor,
    length: Tensor,
    gather_idx: Tensor,
    tile_bias: Tensor | None,
    key_padding: Tensor | None,
    window: Tensor | None,
    plan_batch: int,
    plan_heads: int,
    block_q: int,
    q_offset: int,
    scale: float,
    causal: bool,
    softcap: float | None,
    linear: bool,
    dropout_p: float,
    seed: int,
    window_block: int = 1,
) -> tuple[Tensor, Tensor]:
    """o (B, Hq, Lq, Dv) and lse (B, Hq, Lq) of a lowered plan, without gradients."""
    return attention_forward(
        q,
        k,
        v,
        tile_ptr,
        kind,
        start,
        length,
        gather_idx,
        tile_bias,
        Bp=plan_batch,
        Hp=plan_heads,
        block_q=block_q,
        q_offset=q_offset,
        scale=scale,
        causal=causal,
        window=window,
        window_block=window_block,
        key_padding=key_padding,
        softcap=softcap,
        linear=linear,
        dropout_p=dropout_p,
        seed=seed,
    )


attention_op = torch.library.custom_op("aerogel::attention", attention_now, mutates_args=())


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = q.shape
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, heads, rows, v.shape[3]), q.new_empty(batch, heads, rows, dtype=kind)


@torch.library.custom_op("aerogel::attention_backward", mutates_args=())
def attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_ptr: Tensor,
    kind: Tensor,
    start: Tensor,
    length: Tensor,
    gather_idx: Tensor,
    tile_bias: Tensor | None,
    key_padding: Tensor | None,
    window: Tensor | None,
    plan_batch: int,
    plan_heads: int,
    block_q: int,
    q_offset: int,
    scale: float,
    causal: bool,
    softcap: float | None,
    linear: bool,
    dropout_p: float,
    seed: int,
    window_block: int,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of `tile_bias` (empty if there is none)."""
    dq, dk, dv, dbias = attention_backward(
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
        Bp=plan_batch,
        Hp=plan_heads,
        block_q=block_q,
        q_offset=q_offset,
        scale=scale,
        causal=causal,
        window=window,
        window_block=window_block,
        key_padding=key_padding,
        softcap=softcap,
        linear=linear,
        dropout_p=dropout_p,
        seed=seed,
    )
    return dq, dk, dv, lse.new_empty(0) if dbias is None else dbias


@attention_backward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = rest[5]
    empty = q.new_empty(0, dtype=torch.float32)
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        empty if bias is None else torch.empty_like(bias),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:11], *output)
    ctx.options = inputs[11:]


def _backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    *inputs, o, lse = ctx.saved_tensors
    dq, dk, dv, dbias = attention_backward_op(
        *inputs, *ctx.options, o, lse, do.contiguous(), dlse.contiguous()
    )
    bias = None if inputs[8] is None else dbias
    return (dq, dk, dv, None, None, None, None, None, bias, *([None] * (len(ctx.options) + 2)))


attention_op.register_autograd(_backward, setup_context=_setup)


def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stream: TileStream,
    shape: AttentionShape,
    *,
    scale: float,
    key_padding: Tensor | None = None,
    softcap: float | None = None,
    linear: bool = False,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over a lowered plan: o (B, Hq, Lq, Dv) and lse (B, Hq, Lq), differentiable.

    `linear`, `dropout_p` and `seed` as `attention_forward` takes them.
    """
    tensors = (q, k, v, stream.tile_bias)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    # Calling an operator takes longer than decoding some tokens.
    run = attention_op if differentiable or torch.compiler.is_compiling() else attention_now
    result: tuple[Tensor, Tensor] = run(
        q,
        k,
        v,
        stream.tile_ptr,
        stream.kind,
        stream.start,
        stream.length,
        stream.gather_idx,
        stream.tile_bias,
        key_padding,
        stream.window,
        stream.batch,
        stream.heads,
        stream.block_q,
        shape.q_offset,
        scale,
        shape.causal,
        softcap,
        linear,
        dropout_p,
        seed,
        stream.window_block,
    )
    return result
