"""A KV cache layer of known size: sinks, a ring, and the columns of a stride, per key head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.attention.attending_cache import AttendingCache, CacheCall
from aerogel.attention.block_plan import BlockPlan
from aerogel.attention.counted_cache import CountedCacheLayer
from aerogel.attention.engine import attend_lse
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.plan import Plan
from aerogel.attention.selector import DECODE_ROWS
from aerogel.attention.softmax import merge
from aerogel.attention.span_plan import SpanPlan
from aerogel.kernels import selects_natively
from aerogel.kernels.huge_pages import empty_rows
from aerogel.kernels.ring_step import RingLayout, RingStep, write_rings_reference


class SpanCacheLayer(AttendingCache, CountedCacheLayer):
    """What each key head's span can still read, and nothing else.

    Storage is (B, slots, D) with the heads' slots side by side: a head's sinks, the ring of its
    window, and the blocks on its stride, which grow with the history. Keys keep their positional
    embedding and their true position. `attend` replaces the engine's call on this layer.

    Args:
        span: token or block spans of every head, as steps read them; strided and dense heads need
            blocks, no sinks, and one span for all query heads of a key head.
        kv_heads: key heads; a key head keeps what the widest of its query heads reads.
        prompt: spans of prompts, where they differ (they may read no more than `span` keeps).
        longest: tokens that the sizes are made for; None for any number.
        sized: makes (span, prompt, longest) for the number of tokens that come first, in place of
            those above.

    Raises:
        ValueError: a head has no bounded size.
    """

    refused: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[str] = "a ring has overwritten what a shorter history needs"

    def __init__(
        self,
        span: SpanPlan,
        kv_heads: int,
        *,
        prompt: SpanPlan | None = None,
        longest: int | None = None,
        sized: Callable[[int], tuple[SpanPlan, SpanPlan, int]] | None = None,
    ) -> None:
        super().__init__()
        self._sized, self._kv_heads = sized, kv_heads
        self._most_padded = 0
        self._step: RingStep | None = None
        self.positions = torch.empty(0, dtype=torch.int64)
        self.padded = torch.empty(0, dtype=torch.int64)
        self._before: tuple[Tensor, Tensor, Tensor] | None = None
        self._size(span, prompt, longest)

    def _size(self, span: SpanPlan, prompt: SpanPlan | None, longest: int | None) -> None:
        """Takes the spans of every head, with room for none of the strided blocks yet."""
        kv_heads = self._kv_heads
        if bool(span.dense.any()) or bool((span.stride > 0).any()):
            span = _strided(span, kv_heads)
        unit = 1 if span.granularity == "token" else span.block
        self.span, self.unit = span, unit
        self.prompt, self.longest = span if prompt is None else prompt, longest
        self.sinks = self._widest(span.sink, kv_heads) * unit
        self.windows = self._widest(span.window, kv_heads) * unit
        self.strides = self._widest(span.stride, kv_heads)
        self._has_strides = bool((self.strides > 0).any())
        self.firsts = -self._widest(span.phase, kv_heads) % self.strides.clamp(min=1)
        # Once rings are full, a step reads all slots of a head, if its query heads agree.
        self._bounded = unit == 1 and not self._has_strides
        self._bounded &= self.span.sink.numel() in (1, kv_heads)
        self._most_slots = int((self.sinks + self.windows).max())
        self._lay_out(torch.zeros_like(self.sinks))

    @staticmethod
    def _widest(values: Tensor, kv_heads: int) -> Tensor:
        if values.numel() in (1, kv_heads):
            return values.long().expand(kv_heads).clone()
        return values.long().view(kv_heads, -1).amax(1)

    def _lay_out(self, columns: Tensor) -> None:
        """Where each head's slots are, for so many strided blocks of each."""
        self.columns = columns
        parts = [self.sinks + self.windows, columns * self.span.block]
        self.offsets = torch.nn.functional.pad((parts[0] + parts[1]).cumsum(0), (1, 0))
        self._archive = torch.repeat_interleave(
            torch.tensor([False, True]).repeat(len(columns)), torch.stack(parts, 1).flatten()
        )

    def note_padding(self, padded: Tensor) -> None:
        """Left padding (B,) int64 in tokens; before the first update."""
        if self.seen == 0:
            self.padded = padded.long()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the rings."""
        batch, slots = key_states.shape[0], int(self.offsets[-1])
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = empty_rows(key_states, batch, slots, key_states.shape[-1]).zero_()
        self.values = empty_rows(value_states, batch, slots, value_states.shape[-1]).zero_()
        self.positions = torch.full((batch, slots), -1, device=self.device)
        if self.padded.numel() != batch:
            self.padded = torch.zeros(batch, dtype=torch.int64)
        self.padded = self.padded.to(self.device)
        self._most_padded = int(self.padded.max()) if batch else 0
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes new tokens into their slots; returns the new tokens alone.

        Raises:
            ValueError: more tokens than the cache was sized for.
        """
        new = key_states.shape[2]
        if self._sized is not None and not self.seen:
            self._size(*self._sized(new))
        if self.longest is not None and self.seen + new > self.longest:
            raise ValueError(
                f"{self.seen} tokens and {new} more, but the cache was sized for {self.longest}; "
                "make the selector with a larger length or max_new"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._before = None
        self._grow(self.seen + new)
        if new > 1 and self.seen:
            self._before = (self.keys.clone(), self.values.clone(), self.positions.clone())
        if new == 1 and self.seen >= self._most_padded:
            self._write_step(key_states, value_states)
        else:
            position = torch.arange(self.seen, self.seen + new, device=self.device)
            real = position - self.padded[:, None]  # (B, new)
            for head in range(key_states.shape[1]):
                self._write(head, real, position, key_states[:, head], value_states[:, head])
        self.seen += new
        return key_states, value_states

    def _write_step(self, keys: Tensor, values: Tensor) -> None:
        """One token of all heads, (B, Hkv, 1, D) each."""
        tracked = torch.is_grad_enabled() and (
            keys.requires_grad or values.requires_grad or self.keys.requires_grad
        )
        if not tracked and selects_natively(keys, self.keys):
            self._ring_step().write(self.seen, keys, values)
        else:
            stored = (self.keys, self.values, self.positions)
            write_rings_reference(stored, self._layout(), self.seen, keys, values)

    def _layout(self) -> RingLayout:
        return RingLayout(
            self.offsets, self.sinks, self.windows, self.strides, self.firsts, self.span.block,
            self.padded,
        )  # fmt: skip

    def _ring_step(self) -> RingStep:
        """The native calls on these rings."""
        step = self._step
        if step is None or not step.holds(self.keys, self.values, self.positions):
            step = RingStep(self.keys, self.values, self.positions, self._layout())
            self._step = step
        return step

    def _grow(self, total: int) -> None:
        """Room for the strided blocks of so many tokens."""
        if not self._has_strides:
            return
        blocks = -(-total // self.span.block)
        needed = (blocks - self.firsts + self.strides - 1) // self.strides.clamp(min=1)
        needed = torch.where(self.strides > 0, needed.clamp(min=0), 0)
        if not bool((needed > self.columns).any()):
            return
        old, held = self.offsets.tolist(), (self.keys, self.values, self.positions)
        self._lay_out(torch.maximum(needed, self.columns))
        slots, batch = int(self.offsets[-1]), self.positions.shape[0]
        self.keys = empty_rows(self.keys, batch, slots, self.keys.shape[-1]).zero_()
        self.values = empty_rows(self.values, batch, slots, self.values.shape[-1]).zero_()
        self.positions = self.positions.new_full((batch, slots), -1)
        for head, start in enumerate(self.offsets[:-1].tolist()):
            size = old[head + 1] - old[head]
            for to, source in zip((self.keys, self.values, self.positions), held, strict=True):
                to[:, start : start + size] = source[:, old[head] : old[head] + size]

    def _write(
        self, head: int, real: Tensor, position: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """The tokens of one head that survive into their slots."""
        sink, window = int(self.sinks[head]), int(self.windows[head])
        last = real[:, -1:]
        kept = (real >= 0) & ((real < sink) | (last - real < window))
        around = (real - sink) % max(1, window) + sink
        start = int(self.offsets[head])
        self._store(kept, start + torch.where(real < sink, real, around), position, keys, values)
        stride = int(self.strides[head])
        if stride:
            number = real // self.span.block - int(self.firsts[head])
            slot = start + sink + window + number // stride * self.span.block
            on = (real >= 0) & (number % stride == 0)
            self._store(on, slot + real % self.span.block, position, keys, values)

    def _store(
        self, kept: Tensor, slot: Tensor, position: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        batch, token = kept.nonzero(as_tuple=True)
        at = slot[batch, token]
        self.keys[batch, at] = keys[batch, token]
        self.values[batch, at] = values[batch, token]
        self.positions[batch, at] = position[token]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: CacheCall) -> tuple[Tensor, Tensor]:
        """A first prompt runs on the span itself, single tokens on ranges of slots.

        A later chunk runs on the slots as they were and on its own tokens.
        """
        if call.window is None and self._runs_steady(q, k):
            return self._ring_step().attend(q, call.scale, call.softcap)
        if self.seen == k.shape[2]:
            return self._first_prompt(q, k, v, call)
        options: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap}
        parts = [
            attend_lse(q, keys[:, None], values[:, None], plan=plan, validate=False, **options)
            for keys, values, plan in self._banks(q, k, v, call.window)
        ]
        return parts[0] if len(parts) == 1 else merge(parts)

    def _runs_steady(self, q: Tensor, k: Tensor) -> bool:
        """Whether a step reads every slot, by a kernel."""
        if q.shape[2] != 1 or k.shape[2] == self.seen or not self._bounded:
            return False
        if self.seen - self._most_padded < self._most_slots or q.dtype == torch.float64:
            return False
        differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        return not differentiable and selects_natively(q, self.keys)

    def _first_prompt(
        self, q: Tensor, k: Tensor, v: Tensor, call: CacheCall
    ) -> tuple[Tensor, Tensor]:
        first = self.padded.int() if bool((self.padded > 0).any()) else None
        padding = None
        if first is not None:
            padding = torch.arange(k.shape[2], device=q.device) >= first[:, None]
        plan = replace(self.prompt, first=first)
        return attend_lse(q, k, v, plan=plan, causal=True, key_padding=padding, **call._asdict())

    def _banks(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None
    ) -> list[tuple[Tensor, Tensor, Plan]]:
        """Keys and values of all heads side by side, and what each row reads of them."""
        rows = q.shape[2]
        if rows == 1 and window is None:
            return [(self.keys, self.values, self._step_plan(q.shape[1]))]
        position = torch.arange(self.seen - rows, self.seen, device=q.device)
        owner = torch.repeat_interleave(self.offsets.diff()).to(q.device)
        archive = self._archive.to(q.device)
        if self._before is None:
            stored = (self.keys, self.values, self.positions)
        else:
            stored = self._before
        reads = self._reads(position, stored[2], owner, archive, q.shape[1], window)
        banks: list[tuple[Tensor, Tensor, Plan]] = [
            (stored[0], stored[1], KeyListPlan.from_bitmask(reads))
        ]
        if self._before is not None:
            new = position.repeat(k.shape[1]).expand(q.shape[0], -1)
            owner = torch.arange(k.shape[1], device=q.device).repeat_interleave(rows)
            reads = self._reads(position, new, owner, None, q.shape[1], window)
            banks.append((k.flatten(1, 2), v.flatten(1, 2), KeyListPlan.from_bitmask(reads)))
        return banks

    def _step_plan(self, q_heads: int) -> BlockPlan:
        """The slots that the last token reads, as ranges."""
        shared = torch.arange(q_heads) * self.sinks.numel() // q_heads
        sinks, rings = self.sinks[shared], self.windows[shared]
        sink, window = (_per_head(t, q_heads) for t in (self.span.sink, self.span.window))
        last = (self.seen - 1 - self.padded.cpu())[:, None]  # (B, 1), from the first real token
        low = ((last // self.unit - window + 1) * self.unit).clamp(min=0)
        begin = self.offsets[:-1][shared]
        ring_low = torch.maximum(low, sinks)
        held = (last + 1 - ring_low).clamp(min=0)
        at = (ring_low - sinks) % rings.clamp(min=1)
        whole = torch.minimum(held, rings - at)
        block, stride = self.span.block, self.strides[shared]
        old = (low // block - self.firsts[shared] + stride - 1) // stride.clamp(min=1)
        old = torch.where(stride > 0, old.clamp(min=0), 0) * block
        inside = torch.minimum(sinks, last + 1)
        starts = [begin, begin + low, begin + sinks + at, begin + sinks, begin + sinks + rings]
        lengths = [
            torch.minimum(sink * self.unit, last + 1),
            inside - low,
            whole,
            held - whole,
            old,
        ]
        shape = low.shape
        start = torch.stack([t.expand(shape) for t in starts], -1)
        length = torch.stack([t.expand(shape) for t in lengths], -1).clamp(min=0)
        return BlockPlan.from_ranges(start[:, :, None], length[:, :, None]).to(self.device)

    def _reads(
        self,
        rows: Tensor,
        at: Tensor,
        owner: Tensor,
        archive: Tensor | None,
        q_heads: int,
        limit: int | None,
    ) -> Tensor:
        """(B, Hq, Lq, slots) bool: which tokens each row reads.

        Args:
            rows: (Lq,) positions of the rows.
            at: (B, slots) positions of the tokens.
            owner: (slots,) key head of each.
            archive: (slots,) bool, slots of strided blocks, which count once they have left the
                window; None for tokens that are in no slot yet.
            q_heads: query heads.
            limit: the model's own sliding window.
        """
        span = self.span if len(rows) <= DECODE_ROWS else self.prompt
        unit = 1 if span.granularity == "token" else span.block
        mine = owner == (torch.arange(q_heads) * self.sinks.numel() // q_heads)[:, None].to(at)
        sink, window, stride, phase = (
            _per_head(t, q_heads).to(at.device).view(-1, 1, 1)
            for t in (span.sink * unit, span.window, span.stride, span.phase)
        )
        real = (at - self.padded[:, None])[:, None, None]
        row = (rows - self.padded[:, None])[:, None, :, None]
        distance = row // unit - real // unit
        near = (real < sink) | (distance < window)
        if archive is None:
            column = (real // span.block + phase) % stride.clamp(min=1) == 0
            keep = near | ((stride > 0) & column)
        else:
            keep = torch.where(archive, distance >= window, near)
        keep = keep & (real >= 0) & (real <= row)
        if limit is not None:
            keep &= row - real < limit
        return keep & mine[:, None] & (at >= 0)[:, None, None]

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.seen, self._before, self._step = 0, None, None
        self._lay_out(torch.zeros_like(self.sinks))
        self.padded = torch.empty(0, dtype=torch.int64)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, as long as no ring has gone round.

        Args:
            tokens_to_remove: their negative number.

        Raises:
            ValueError: a ring has overwritten what the shorter history reads, or the number is
                positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: expected 0 or below")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        room = int((self.sinks + self.windows).min())
        held = self.seen - int(self.padded.min()) if self.padded.numel() else 0
        if held > room:
            raise ValueError(
                f"crop: {held} tokens went into a ring of {room}, which cannot give back what it "
                "has overwritten"
            )
        left = self.seen + tokens_to_remove
        if left <= 0:
            self.reset()
            return
        self.positions.masked_fill_(self.positions >= left, -1)
        self.seen, self._before = left, None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some batch elements."""
        if self.is_initialized:
            indices = indices.to(self.device)
            self.keys, self.values = self.keys[indices], self.values[indices]
            self.positions, self.padded = self.positions[indices], self.padded[indices]


def _per_head(values: Tensor, q_heads: int) -> Tensor:
    """(Hq,) int64 of values for 1, key or query heads."""
    return values.long().cpu().repeat_interleave(q_heads // values.numel())


def _strided(span: SpanPlan, kv_heads: int) -> SpanPlan:
    """A span whose dense heads have a stride of one block."""
    plain = span.granularity == "block" and not bool((span.sink > 0).any())
    if not plain or span.sink.numel() not in (1, kv_heads):
        raise ValueError(
            "span: dense and strided heads have a bounded cache only in blocks, without sinks and "
            "with one span per key head"
        )
    one = torch.ones_like(span.window)
    return replace(
        span,
        window=torch.where(span.dense, one, span.window),
        stride=torch.where(span.dense, one, span.stride),
        dense=torch.zeros_like(span.dense),
    )
