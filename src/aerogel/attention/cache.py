"""KV caches: growing without copies, and rings of a size known beforehand.

Needs transformers 5 or later.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from aerogel.attention.engine import attend_lse
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.softmax import apply_sink, merge
from aerogel.attention.span_plan import SpanPlan

_FIRST_CAPACITY = 64  # tokens


class SelectorCacheLayer(DynamicLayer):
    """Keys and values in buffers that double, and side state per token beside them.

    `side` maps names to tensors whose dimension 0 is the batch and whose second-last is the token
    (labels as (B, H, L, 1), compressed keys as (B, H, L, r)); `append_side` grows them, and they
    follow `crop`, `reorder_cache`, `batch_select_indices` and `batch_repeat_interleave`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.side: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends new keys and values; returns all of them, as views of the buffers.

        Raises:
            ValueError: they require gradients, which writing in place would lose.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "key_states: require gradients, but this cache writes in place; "
                "use it under torch.no_grad()"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def append_side(self, name: str, new: Tensor) -> Tensor:
        """Appends side state (B, ..., tokens, n) under a name; returns all of it."""
        self.side[name] = self._appended(name, self.side.get(name), new)
        return self.side[name]

    def _appended(self, name: str, old: Tensor | None, new: Tensor) -> Tensor:
        have = 0 if old is None or old.numel() == 0 else old.shape[-2]
        need = have + new.shape[-2]
        buffer = self._buffers.get(name)
        ours = (
            buffer is not None
            and have
            and old is not None
            and old.data_ptr() == buffer.data_ptr()
            and buffer.shape[:-2] == new.shape[:-2]
        )
        if buffer is None or not ours or buffer.shape[-2] < need:
            room = max(_FIRST_CAPACITY, 1 << (need - 1).bit_length())
            buffer = new.new_empty(*new.shape[:-2], room, new.shape[-1])
            if have and old is not None:
                buffer[..., :have, :] = old
            self._buffers[name] = buffer
        buffer[..., have:need, :] = new
        return buffer[..., :need, :]

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.side.clear()
        self._buffers.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; `tokens_to_remove` is their negative number."""
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0:
            self.side = {name: t[..., :tokens_to_remove, :] for name, t in self.side.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: element b continues the history of element ``beam_idx[b]``."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.side = {n: t.index_select(0, beam_idx.to(t.device)) for n, t in self.side.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some batch elements."""
        super().batch_select_indices(indices)
        self.side = {name: t[indices] for name, t in self.side.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch element."""
        super().batch_repeat_interleave(repeats)
        self.side = {name: t.repeat_interleave(repeats, 0) for name, t in self.side.items()}


class SpanCacheLayer(DynamicLayer):
    """A ring per key head that holds its sinks and its window, and nothing else.

    Storage is (B, slots, D) with the heads' slots side by side; keys keep their positional
    embedding and their true position. `attend` replaces the engine's call on this layer.

    Args:
        span: token or block spans of every query head; no strides.
        kv_heads: key heads; a key head keeps what the widest of its query heads reads.

    Raises:
        ValueError: a head is dense or strided, so it has no bounded size.
    """

    is_croppable = False
    keys: Any
    values: Any

    def __init__(self, span: SpanPlan, kv_heads: int) -> None:
        super().__init__()
        sizes = span.cache_tokens()
        if any(size is None for size in sizes):
            raise ValueError("span: dense or strided heads have no bounded cache")
        unit = 1 if span.granularity == "token" else span.block
        self.span, self.unit, self.seen = span, unit, 0
        self.sinks = self._widest(span.sink, kv_heads) * unit
        self.windows = self._widest(span.window, kv_heads) * unit
        sizes_per_head = self.sinks + self.windows
        self.offsets = torch.nn.functional.pad(sizes_per_head.cumsum(0), (1, 0))
        self.positions = torch.empty(0, dtype=torch.int64)
        self.padded = torch.empty(0, dtype=torch.int64)
        self._before: tuple[Tensor, Tensor, Tensor] | None = None

    @staticmethod
    def _widest(values: Tensor, kv_heads: int) -> Tensor:
        if values.numel() in (1, kv_heads):
            return values.long().expand(kv_heads).clone()
        return values.long().view(kv_heads, -1).amax(1)

    def note_padding(self, padded: Tensor) -> None:
        """Left padding (B,) int64 in tokens; before the first update."""
        if self.seen == 0:
            self.padded = padded.long()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the rings."""
        batch, slots = key_states.shape[0], int(self.offsets[-1])
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(batch, slots, key_states.shape[-1])
        self.values = value_states.new_zeros(batch, slots, value_states.shape[-1])
        self.positions = torch.full((batch, slots), -1, device=self.device)
        if self.padded.numel() != batch:
            self.padded = torch.zeros(batch, dtype=torch.int64)
        self.padded = self.padded.to(self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes new tokens into the rings; returns the new tokens alone."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._before = None
        if key_states.shape[2] > 1 and self.seen:
            self._before = (self.keys.clone(), self.values.clone(), self.positions.clone())
        new = key_states.shape[2]
        position = torch.arange(self.seen, self.seen + new, device=self.device)
        real = position - self.padded[:, None]  # (B, new)
        for head in range(key_states.shape[1]):
            self._write(head, real, position, key_states[:, head], value_states[:, head])
        self.seen += new
        return key_states, value_states

    def _write(
        self, head: int, real: Tensor, position: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """The tokens of one head that survive into their slots."""
        sink, window = int(self.sinks[head]), int(self.windows[head])
        last = real[:, -1:]
        kept = (real >= 0) & ((real < sink) | (last - real < window))
        around = (real - sink) % max(1, window) + sink
        slot = int(self.offsets[head]) + torch.where(real < sink, real, around)
        batch, token = kept.nonzero(as_tuple=True)
        at = slot[batch, token]
        self.keys[batch, at] = keys[batch, token]
        self.values[batch, at] = values[batch, token]
        self.positions[batch, at] = position[token]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sink_logit: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Attention after `update`: q (B, Hq, Lq, D), and the new k and v; options as `attend`.

        A first prompt runs on the span itself; a later chunk on the rings as they were and on its
        own tokens; single tokens on the rings.

        Raises:
            ValueError: dropout.
        """
        rows = q.shape[2]
        if dropout_p:
            raise ValueError(f"dropout_p={dropout_p}: expected 0 with a cache")
        if self.seen == k.shape[2]:
            first = self.padded.int() if bool((self.padded > 0).any()) else None
            padding = None
            if first is not None:
                padding = torch.arange(k.shape[2], device=q.device) >= first[:, None]
            o, lse = attend_lse(
                q,
                k,
                v,
                plan=replace(self.span, first=first),
                causal=True,
                scale=scale,
                window=window,
                softcap=softcap,
                key_padding=padding,
            )
            return o if sink_logit is None else apply_sink(o, lse, sink_logit)[0]
        position = torch.arange(self.seen - rows, self.seen, device=q.device)
        if self._before is None:
            banks = [(self.keys, self.values, self.positions, self._ring_heads())]
        else:
            new = position.repeat(k.shape[1]).expand(q.shape[0], -1)
            owner = torch.arange(k.shape[1], device=q.device).repeat_interleave(rows)
            banks = [
                (*self._before, self._ring_heads()),
                (k.flatten(1, 2), v.flatten(1, 2), new, owner),
            ]
        parts = []
        for keys, values, at, owner in banks:
            reads = self._reads(position, at, owner, q.shape[1], window)
            plan = KeyListPlan.from_bitmask(reads)
            parts.append(
                attend_lse(
                    q,
                    keys[:, None],
                    values[:, None],
                    plan=plan,
                    scale=scale,
                    softcap=softcap,
                    validate=False,
                )
            )
        o, lse = merge(parts)
        return o if sink_logit is None else apply_sink(o, lse, sink_logit)[0]

    def _ring_heads(self) -> Tensor:
        """Key head of every slot."""
        return torch.repeat_interleave(self.offsets.diff()).to(self.device)

    def _reads(
        self, rows: Tensor, at: Tensor, owner: Tensor, q_heads: int, limit: int | None
    ) -> Tensor:
        """(B, Hq, Lq, slots) bool: which stored tokens each row reads."""
        kv_heads = self.sinks.numel()
        mine = owner == (torch.arange(q_heads, device=at.device) * kv_heads // q_heads)[:, None]
        sink, window = (
            t.long().to(at.device).expand(q_heads).view(-1, 1, 1)
            if t.numel() in (1, q_heads)
            else t.long().to(at.device).repeat_interleave(q_heads // t.numel()).view(-1, 1, 1)
            for t in (self.span.sink * self.unit, self.span.window)
        )
        j = at[:, None, None]
        real = j - self.padded[:, None, None, None]
        distance = rows[:, None] // self.unit - j // self.unit
        keep = (real >= 0) & (j <= rows[:, None]) & ((real < sink) | (distance < window))
        if limit is not None:
            keep &= rows[:, None] - j < limit
        return keep & mine[:, None] & (at >= 0)[:, None, None]

    def get_seq_length(self) -> int:
        """All tokens seen, kept or not."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the padding mask: all tokens."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.seen, self._before = 0, None
        self.padded = torch.empty(0, dtype=torch.int64)

    def crop(self, tokens_to_remove: int) -> None:
        """Rings have overwritten what a shorter history needs.

        Raises:
            ValueError: a token would have to be removed.
        """
        if tokens_to_remove:
            raise ValueError("crop: a ring cannot give back the tokens it has overwritten")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: element b continues the history of element ``beam_idx[b]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some batch elements."""
        if self.is_initialized:
            indices = indices.to(self.device)
            self.keys, self.values = self.keys[indices], self.values[indices]
            self.positions, self.padded = self.positions[indices], self.padded[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch element."""
        if self.is_initialized:
            index = torch.arange(self.keys.shape[0], device=self.device)
            self.batch_select_indices(index.repeat_interleave(repeats))


class AerogelCache(Cache):
    """A cache whose layers are what each layer's selector asks for.

    Args:
        model: a transformers model with `aerogel.attention.attach`, or any other (all layers then
            are `SelectorCacheLayer`).
    """

    def __init__(self, model: Any) -> None:
        from aerogel.attention.hf import attached_layers

        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        states = {state.layer_idx: state for state in attached_layers(model)}
        layers: list[Any] = []
        for index in range(config.num_hidden_layers):
            state = states.get(index)
            wanted = None if state is None else state.selector.cache_layer(index, heads)
            layers.append(SelectorCacheLayer() if wanted is None else wanted)
        super().__init__(layers=layers)
