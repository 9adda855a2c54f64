"""Forward calls whose shapes and rules were checked once: only addresses are left to change.

The layers of a model and, where the cache is a ring or a step repeats, its steps make the same call
on other memory. In decoding, checking it anew takes longer than some of the reading: what is looked
at here is what could make a kernel read where it must not.
"""

from __future__ import annotations

import atexit
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels._library import native_in_use
from aerogel.kernels.attention_call import STREAM_TYPES, AttentionCall

_MOST_CALLS = 64  # kept at a time; when there are more, all are forgotten
_PLAIN = (int, float, bool, type(None))


@dataclass(frozen=True, slots=True)
class KeptForward:
    """A native call without its addresses.

    Attributes:
        args: native, with everything but where tensors lie.
        window: what args refers to, or None.
        pointers: the shape of `tile_ptr`.
        o_shape: (B, Hq, Lq, Dv), or (B, Lq, Hq, Dv) with heads inside of rows.
        inside: which of the two.
        lse_shape: (B, Hq, Lq).
    """

    args: Any
    window: Tensor | None
    pointers: tuple[int]
    o_shape: tuple[int, ...]
    inside: bool
    lse_shape: tuple[int, ...]

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, stream: tuple[Tensor, ...], threads: int | None
    ) -> tuple[Tensor, Tensor] | None:
        """o and lse; None for a stream or threads that only a full check can judge."""
        tile_ptr, kind, start, length, gather_idx = stream
        tiles = kind.shape
        whole = tile_ptr.shape == self.pointers and start.shape == tiles == length.shape
        if not whole or len(tiles) != 1 or len(gather_idx.shape) != 1:
            return None
        for x, dtype in zip(stream, STREAM_TYPES, strict=True):
            if x.dtype is not dtype or not x.is_cpu or not x.is_contiguous():
                return None
        threads = torch.get_num_threads() if threads is None else threads
        if threads < 1:
            return None
        o = q.new_empty(self.o_shape)
        if self.inside:
            o = o.transpose(1, 2)
        lse = q.new_empty(self.lse_shape, dtype=torch.float32)
        self.args.again(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr(),
            tile_ptr.data_ptr(), kind.data_ptr(), start.data_ptr(), length.data_ptr(),
            gather_idx.data_ptr(), tiles[0], gather_idx.shape[0], threads,
        )  # fmt: skip
        return o, lse


Key = tuple[Any, ...]
_kept: dict[Key, KeptForward] = {}
atexit.register(_kept.clear)  # native objects go before their types do


def call_key(q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...]) -> Key:
    """What decides whether a call is the same but for its memory."""
    return (
        q.shape, q.stride(), q.dtype, q.is_cpu, k.shape, k.stride(), k.dtype, k.is_cpu,
        v.shape, v.stride(), v.dtype, v.is_cpu, options,
    )  # fmt: skip


def kept_forward(key: Key) -> KeptForward | None:
    """The call kept under a key, if there is one and the native kernels run it."""
    kept = _kept.get(key)
    return None if kept is None or native_in_use() is None else kept


def keep_forward(
    key: Key, args: Any, call: AttentionCall, given: tuple[Tensor, ...], o: Tensor
) -> None:
    """Keeps a call that has run, unless it read copies or its rules are tensors."""
    copied = any(x is not y for x, y in zip((call.q, call.k, call.v), given, strict=True))
    if copied or not all(isinstance(x, _PLAIN) for x in key[-1]):
        return
    inside = not o.is_contiguous()
    shape = o.transpose(1, 2).shape if inside else o.shape
    pointers = (call.stream[0].shape[0],)
    if len(_kept) >= _MOST_CALLS:
        _kept.clear()
    _kept[key] = KeptForward(args, call.window, pointers, shape, inside, call.q.shape[:3])
