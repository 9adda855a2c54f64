"""A decoding step on the rings of a KV cache: one token in, attention over every slot.

Attention sweeps the processor's caches, so each small call of torch beside it costs several times
what it does in a loop of its own. All that stays is therefore prepared once; a step makes one
native call that writes and one that reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from aerogel.kernels._library import native
from aerogel.kernels.attention import prepared_attention
from aerogel.kernels.attention_lower import lower_ranges


class RingLayout(NamedTuple):
    """Where tokens lie: of each key head its sinks, its ring and its blocks, heads side by side.

    Attributes:
        offsets: (Hkv + 1,) int64, first slot of each head, and their number.
        sinks: (Hkv,) int64 slots.
        windows: (Hkv,) int64 slots of the ring.
        strides: (Hkv,) int64, one of so many blocks is kept for good; 0 for none.
        firsts: (Hkv,) int64, the first block that is.
        block: tokens of a block.
        padded: (B,) int64, tokens of padding before the first real one.
    """

    offsets: Tensor
    sinks: Tensor
    windows: Tensor
    strides: Tensor
    firsts: Tensor
    block: int
    padded: Tensor

    def slots(self, position: int) -> list[Tensor]:
        """(B, Hkv) slots of the token at a position, in ring and blocks; -1 where it has none."""
        real = (position - self.padded.cpu())[:, None]
        place = self.sinks + (real - self.sinks) % self.windows.clamp(min=1)
        place = torch.where(real < self.sinks, real, place)
        kept = (real >= 0) & ((real < self.sinks) | (self.windows > 0))
        number, stride = real // self.block - self.firsts, self.strides.clamp(min=1)
        column = self.sinks + self.windows + number // stride * self.block + real % self.block
        on = (real >= 0) & (self.strides > 0) & (number >= 0) & (number % stride == 0)
        return [
            torch.where(mask, self.offsets[:-1] + at, -1)
            for at, mask in ((place, kept), (column, on))
        ]


def write_rings_reference(
    stored: tuple[Tensor, Tensor, Tensor],
    layout: RingLayout,
    position: int,
    keys: Tensor,
    values: Tensor,
) -> None:
    """`RingStep.write` in torch; `stored` is keys, values and positions."""
    for slot in layout.slots(position):
        batch, head = (slot.to(keys.device) >= 0).nonzero(as_tuple=True)
        at = slot.to(keys.device)[batch, head]
        stored[0][batch, at] = keys[batch, head, 0]
        stored[1][batch, at] = values[batch, head, 0]
        stored[2][batch, at] = position


class RingStep:
    """The native calls of a step on given rings.

    Args:
        keys: (B, slots, D), contiguous, on the CPU.
        values: (B, slots, Dv), the same.
        positions: (B, slots) int64, the same.
        layout: of the slots.
    """

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, layout: RingLayout) -> None:
        self._stored = (keys, values, positions)
        self._layout = layout
        self._kv_heads = layout.sinks.numel()
        self._item = keys.element_size()
        self._rings = native().Rings(
            keys.data_ptr(),
            values.data_ptr(),
            positions.data_ptr(),
            keys.shape[1],
            keys.shape[2] * self._item,
            values.shape[2] * self._item,
            layout.offsets[:-1].tolist(),
            *(x.tolist() for x in layout[1:5]),
            layout.block,
            layout.padded.tolist(),
        )
        self._call: tuple[Any, ...] = ()
        self._attend: Any = None
        self._keep: Any = None

    def holds(self, keys: Tensor, values: Tensor, positions: Tensor) -> bool:
        """Whether these are its rings."""
        stored = self._stored
        return stored[0] is keys and stored[1] is values and stored[2] is positions

    def write(self, position: int, keys: Tensor, values: Tensor) -> None:
        """One token of all heads: (B, Hkv, 1, D) and (B, Hkv, 1, Dv).

        Raises:
            ValueError: other sizes or types than the rings hold.
        """
        strides = []
        for name, new, old in zip(("keys", "values"), (keys, values), self._stored, strict=False):
            wanted = (old.shape[0], self._kv_heads, 1, old.shape[2])
            if new.shape != wanted or new.dtype is not old.dtype:
                raise ValueError(
                    f"{name}: {new.dtype} {tuple(new.shape)}, expected {old.dtype} {wanted}"
                )
            strides.append(new.stride())
        if strides[0][3] != 1 or strides[1][3] != 1:
            keys, values = keys.contiguous(), values.contiguous()
            strides = [keys.stride(), values.stride()]
        (key_batch, key_head, *_), (value_batch, value_head, *_) = strides
        item = self._item
        self._rings.write(
            position,
            keys.data_ptr(),
            key_batch * item,
            key_head * item,
            values.data_ptr(),
            value_batch * item,
            value_head * item,
        )

    def attend(self, q: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """What one query per head reads from all slots of its key head.

        Args:
            q: (B, Hq, 1, D).
            scale: factor of the logits.
            softcap: as `attention_forward`.

        Returns:
            o (B, Hq, 1, Dv) and lse (B, Hq, 1), as `attention_forward`.

        Raises:
            ValueError: as `attention_forward`.
        """
        call = (q.shape, q.stride(), q.dtype, scale, softcap)
        if call != self._call:
            if q.stride(-1) != 1:
                q = q.contiguous()
            self._prepare(q, scale, softcap)
            self._call = (q.shape, q.stride(), q.dtype, scale, softcap)
        batch, heads = q.shape[:2]
        o = q.new_empty(batch, heads, 1, self._stored[1].shape[2])
        lse = torch.empty(batch, heads, 1, dtype=torch.float32, device="cpu")
        self._attend.step(q.data_ptr(), o.data_ptr(), lse.data_ptr(), torch.get_num_threads())
        return o, lse

    def _prepare(self, q: Tensor, scale: float, softcap: float | None) -> None:
        """A group's query heads are rows of its key head."""
        heads, (keys, values, _) = self._kv_heads, self._stored
        batch, group = q.shape[0], q.shape[1] // heads
        stream = lower_ranges(
            torch.arange(heads + 1), self._layout.offsets[:-1], self._layout.offsets.diff(), Bp=1,
            Hp=heads, block_q=group, q_len=group, k_len=keys.shape[1],
        )  # fmt: skip
        rows = q.as_strided(
            (batch, heads, group, q.shape[3]),
            (q.stride(0), group * q.stride(1), q.stride(1), 1),
        )
        self._attend, self._keep = prepared_attention(
            rows, keys[:, None], values[:, None], stream[:5], Bp=1, Hp=heads, block_q=group,
            scale=scale, softcap=softcap,
        )  # fmt: skip
