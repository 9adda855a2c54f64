"""The meaning of a `TileStream`, in torch: what a kernel must compute from lowered tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.attention.lowering import TileStream
from aerogel.attention.reference import by_group
from aerogel.attention.shape import AttentionShape
from aerogel.attention.softmax import masked_attention


def stream_planes(
    stream: TileStream, shape: AttentionShape, key_padding: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Mask (B or Bp, Hp, Lq, Lk) bool and differentiable bias of the same shape, or None."""
    row, key, tile = stream.tile_pairs(shape)
    plane = (stream.batch, stream.heads, shape.q_len, shape.k_len)
    mask = torch.zeros(plane, dtype=torch.bool, device=row.device)
    mask.view(-1, shape.k_len)[row, key] = True
    if key_padding is not None:
        mask = mask & key_padding[:, None, None]
    if stream.tile_bias is None:
        return mask, None
    flat = stream.tile_bias.new_zeros(stream.batch * stream.heads * shape.q_len, shape.k_len)
    return mask, flat.index_put((row, key), stream.tile_bias[tile]).view(plane)


def stream_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stream: TileStream,
    shape: AttentionShape,
    *,
    scale: float,
    key_padding: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """o (B, Hq, Lq, Dv) in q's type and lse (B, Hq, Lq)."""
    mask, bias = stream_planes(stream, shape, key_padding)
    o, lse, _ = masked_attention(
        q.unflatten(1, (shape.kv_heads, -1)),
        k[:, :, None],
        v[:, :, None],
        by_group(mask, shape.q_heads, shape.kv_heads),
        scale=scale,
        softcap=softcap,
        bias=None if bias is None else by_group(bias, shape.q_heads, shape.kv_heads),
    )
    return o.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)
