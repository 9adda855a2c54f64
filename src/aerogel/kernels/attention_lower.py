"""Lowering: what a selector chose becomes the tiles that `attention_forward` reads.

Ranges of keys are cut to what the causal rule and the window leave to some query of a tile, merged
where they touch, and cut into tiles of at most 64 keys. A tile is compared key by key (EDGE) only
where the causal rule or the window cuts it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel.kernels._calls import address
from aerogel.kernels._library import native, native_in_use
from aerogel.kernels.attention_call import MAX_BLOCK_Q
from aerogel.kernels.attention_lower_reference import (
    RangeLists,
    SpanLists,
    TileShape,
    lower_ranges_reference,
    lower_spans_reference,
)


class TileStream(NamedTuple):
    """Tiles of every query tile; the first five are arguments of `attention_forward`.

    Attributes:
        tile_ptr: (R + 1,) int64, R = Bp * Hp * ceil(Lq / block_q).
        kind: (T,) uint8, see `attention_forward`.
        start: (T,) int32.
        length: (T,) int16.
        gather_idx: int32 keys of GATHER tiles.
        source: (T,) int32, which range a tile is of, -1 for GATHER tiles; None if ranges were
            merged. A bias per range becomes one per tile by ``bias[source]``.
    """

    tile_ptr: Tensor
    kind: Tensor
    start: Tensor
    length: Tensor
    gather_idx: Tensor
    source: Tensor | None


def lower_ranges(
    range_ptr: Tensor,
    start: Tensor,
    length: Tensor | int,
    *,
    Bp: int,
    Hp: int,
    block_q: int,
    q_len: int,
    k_len: int,
    unit: int = 1,
    q_offset: int | None = None,
    causal: bool = False,
    window: int | Tensor | None = None,
    window_block: int = 1,
    token_ptr: Tensor | None = None,
    token: Tensor | None = None,
    separate: bool = False,
) -> TileStream:
    """Ranges of keys, and single keys besides, for each query tile.

    A BlockPlan with blocks of n keys is ``start=col, unit=n, length=n``; with offsets, ``unit=1``.

    Args:
        range_ptr: R + 1 entries (any shape whose rows of tiles follow each other, without repeated
            ends), R = Bp * Hp * ceil(q_len / block_q): which ranges each query tile has.
        start: (n,) first keys in units of `unit`, ascending within a query tile.
        length: (n,) keys of each range, or one number for all.
        Bp: batch dimension of the plan.
        Hp: its head dimension.
        block_q: queries in a query tile.
        q_len: queries.
        k_len: keys; ranges are cut there.
        unit: keys in a unit of `start`.
        q_offset: position of the first query, default ``k_len - q_len``.
        causal: as `attention_forward` will get it.
        window: likewise.
        window_block: likewise.
        token_ptr: R + 1 entries, which single keys each query tile has besides.
        token: (m,) single keys, ascending within a query tile; those inside of its ranges are
            passed over.
        separate: tiles keep to one range and `source` tells which; ranges must not overlap then.

    Raises:
        ValueError: ranges or tokens are out of order, or sizes do not fit.
    """
    shape = _shape(Bp, Hp, block_q, q_len, k_len, q_offset, causal, window, window_block)
    if (token_ptr is None) != (token is None):
        raise ValueError("token: expected with token_ptr, and without")
    lists = RangeLists(
        _pointers("range_ptr", range_ptr, shape.rows, start.numel()),
        start.reshape(-1).to(torch.int32).contiguous(),
        length if isinstance(length, int) else length.reshape(-1).to(torch.int32).contiguous(),
        unit,
        None if token is None else _pointers("token_ptr", token_ptr, shape.rows, token.numel()),
        None if token is None else token.reshape(-1).to(torch.int32).contiguous(),
        separate,
    )
    if isinstance(lists.length, Tensor) and lists.length.numel() != start.numel():
        raise ValueError(f"length: {lists.length.numel()} entries, expected {start.numel()}")
    if unit < 1:
        raise ValueError(f"unit={unit}: expected at least 1")
    if not _native(range_ptr):
        return TileStream(*lower_ranges_reference(shape, lists))
    fixed = isinstance(lists.length, int)
    lowered = native().lower_ranges(
        _native_shape(shape),
        lists.ptr.data_ptr(),
        lists.start.data_ptr(),
        0 if isinstance(lists.length, int) else lists.length.data_ptr(),
        unit,
        lists.length if fixed else 0,
        address(lists.token_ptr),
        address(lists.token),
        separate,
    )
    return _stream(lowered, shape, separate)


def lower_spans(
    sink: Tensor,
    window: Tensor,
    stride: Tensor,
    phase: Tensor,
    dense: Tensor,
    *,
    block: int,
    by_block: bool,
    block_q: int,
    q_len: int,
    k_len: int,
    q_offset: int | None = None,
    causal: bool = True,
) -> TileStream:
    """The first, the last and every n-th keys for each query tile, without any list.

    A query at position p reads key j <= p where ``j < sink``, ``p - j < window``, or ``stride > 0``
    and ``(j // block + phase) % stride == 0``. With `by_block`, sink and window count blocks:
    ``j // block < sink``, ``p // block - j // block < window``.

    Give `attention_forward` the same `window`, and ``window_block=block`` with `by_block`.

    Args:
        sink: (Hp,) integers, one per head of the plan; 0 for none.
        window: (Hp,) integers, 0 for none.
        stride: (Hp,) integers, 0 for none.
        phase: (Hp,) integers.
        dense: (Hp,) bool, heads that read all keys.
        block: keys of a block.
        by_block: whether sink and window count blocks.
        block_q: queries in a query tile.
        q_len: queries.
        k_len: keys.
        q_offset: position of the first query, default ``k_len - q_len``.
        causal: whether keys after a query's position are cut.

    Raises:
        ValueError: sizes do not fit.
    """
    heads = sink.numel()
    if block < 1:
        raise ValueError(f"block={block}: expected at least 1")
    unit = block if by_block else 1
    shape = _shape(1, heads, block_q, q_len, k_len, q_offset, causal, window, unit)
    lists = SpanLists(
        sink=_per_head("sink", sink, heads),
        window=_per_head("window", window, heads),
        stride=_per_head("stride", stride, heads),
        phase=_per_head("phase", phase, heads),
        dense=_per_head("dense", dense, heads).to(torch.bool),
        block=block,
        by_block=by_block,
    )
    if not _native(sink):
        return TileStream(*lower_spans_reference(shape, lists))
    lowered = native().lower_spans(
        _native_shape(shape),
        lists.sink.data_ptr(),
        lists.window.data_ptr(),
        lists.stride.data_ptr(),
        lists.phase.data_ptr(),
        lists.dense.data_ptr(),
        block,
        by_block,
    )
    return _stream(lowered, shape, False)


def _native(x: Tensor) -> bool:
    return x.is_cpu and native_in_use() is not None


def _per_head(name: str, x: Tensor, heads: int) -> Tensor:
    if tuple(x.shape) != (heads,) or x.is_floating_point():
        raise ValueError(f"{name}: {x.dtype} {tuple(x.shape)}, expected integers ({heads},)")
    return x.to(torch.int64).contiguous()


def _pointers(name: str, x: Tensor | None, rows: int, entries: int) -> Tensor:
    """(rows + 1,) int64 that rise from 0 to `entries`."""
    if x is None or x.numel() != rows + 1:
        found = 0 if x is None else x.numel()
        raise ValueError(f"{name}: {found} entries, expected {rows + 1}")
    x = x.reshape(-1).to(torch.int64).contiguous()
    if _native(x):
        if not native().rises(x.data_ptr(), rows + 1, entries):
            raise ValueError(f"{name}: expected to rise from 0 to {entries}")
        return x
    if int(x[0]) != 0 or int(x[-1]) != entries or bool((x.diff() < 0).any()):
        raise ValueError(f"{name}: expected to rise from 0 to {entries}")
    return x


def _shape(
    batch: int,
    heads: int,
    block_q: int,
    q_len: int,
    k_len: int,
    q_offset: int | None,
    causal: bool,
    window: int | Tensor | None,
    window_block: int,
) -> TileShape:
    if batch < 1 or heads < 1:
        raise ValueError(f"Bp={batch}, Hp={heads}: expected at least 1")
    if not 1 <= block_q <= MAX_BLOCK_Q:
        raise ValueError(f"block_q={block_q}: expected 1 to {MAX_BLOCK_Q}")
    if q_len < 0 or k_len < 0:
        raise ValueError(f"q_len={q_len}, k_len={k_len}: expected no negative length")
    if window_block < 1:
        raise ValueError(f"window_block={window_block}: expected at least 1")
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"window={window}: expected at least 1, or None")
        window = torch.full((heads,), window)
    per_head = None if window is None else _per_head("window", window, heads)
    offset = k_len - q_len if q_offset is None else q_offset
    return TileShape(batch, heads, block_q, q_len, k_len, offset, causal, per_head, window_block)


def _native_shape(shape: TileShape) -> Any:
    return native().LowerShape.of(
        *shape[:6], shape.causal, address(shape.window), shape.window_block
    )


def _stream(lowered: Any, shape: TileShape, separate: bool) -> TileStream:
    tiles = lowered.tiles
    stream = TileStream(
        torch.empty(shape.rows + 1, dtype=torch.int64, device="cpu"),
        torch.empty(tiles, dtype=torch.uint8, device="cpu"),
        torch.empty(tiles, dtype=torch.int32, device="cpu"),
        torch.empty(tiles, dtype=torch.int16, device="cpu"),
        torch.empty(lowered.gathers, dtype=torch.int32, device="cpu"),
        torch.empty(tiles, dtype=torch.int32, device="cpu") if separate else None,
    )
    lowered.copy(*map(address, stream))
    return stream
