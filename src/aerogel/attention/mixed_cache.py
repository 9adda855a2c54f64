"""A KV cache in two precisions: important tokens in more bits, or they alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from aerogel.arguments import check_choice, check_count
from aerogel.attention.attending_cache import AttendingCache, CacheCall
from aerogel.attention.counted_cache import CountedCacheLayer
from aerogel.attention.engine import attend_lse
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.probe import mass_budget
from aerogel.attention.quantise import (
    BITS,
    quantise_keys,
    quantise_values,
    value_channels,
)
from aerogel.attention.selector import AttentionContext
from aerogel.attention.shape import AttentionShape
from aerogel.attention.softmax import merge
from aerogel.attention.token_plan import (
    TokenPlan,
    batch_as_heads,
    gather_tokens,
    heads_as_batch,
)
from aerogel.kernels.attention_codes import CodedTokens, TokenCodes

Mode = Literal["quant", "evict"]


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens of one precision, each batch element its own.

    Attributes:
        positions: (B, n) int32 places in the sequence, -1 = empty; the real ones are first.
        keys: (B, H, n, D), or in codes.
        values: (B, H, n, Dv), or in codes.
    """

    positions: Tensor
    keys: Tensor | TokenCodes
    values: Tensor | TokenCodes

    def parts(self) -> list[Tensor]:
        """What it stores."""
        stored = [x.parts() if isinstance(x, TokenCodes) else [x] for x in (self.keys, self.values)]
        return [self.positions, *stored[0], *stored[1]]

    def select(self, index: Tensor) -> Segment:
        """Some batch elements."""
        keys, values = (
            x.select(index) if isinstance(x, TokenCodes) else x[index]
            for x in (self.keys, self.values)
        )
        return Segment(self.positions[index], keys, values)


class MixedPrecisionCacheLayer(AttendingCache, CountedCacheLayer):
    """Keys and values in codes, and the last tokens as they came.

    A first prompt is attended to in full precision through `choose`, then stored: the tokens that
    the plan names in `bits_important`, the others in `bits_other` (or, with "evict", not at all).
    New tokens stay as they are until `stream_gap` of them are there; they become segments of their
    own, and old segments are never coded again. All stored tokens take part in attention.

    Args:
        choose: (context) -> plan of a first prompt; a `TokenPlan` names the important tokens,
            another plan means all. Default: all.
        bits_important: 2, 4, 8, or 16: kept as they are.
        bits_other: the same, for the other tokens.
        stream_gap: new tokens that are coded together.
        tau: share of the last query's attention that a stream's important tokens hold.
        kv: "quant" or "evict".
        layer_idx: of this layer.
        scale_dtype: type of ranges and channel factors.
        per_kv_head: every key head has important tokens of its own: heads are batch elements in all
            that is stored, and in what `choose` sees.
        sparse_prompt: a first prompt attends by the plan; else densely, and the plan only says what
            is stored in which bits (ZipCache).

    Attributes:
        segments: all stored tokens but the tail, oldest first.
        coded: those of them that are in codes, as the kernel reads them.

    Raises:
        ValueError: an option is out of range.
    """

    kept: ClassVar[str] = "the codes of a segment share their ranges"

    def __init__(
        self,
        choose: Callable[[AttentionContext], Plan] | None = None,
        bits_important: int = 4,
        bits_other: int = 2,
        stream_gap: int = 100,
        tau: float = 0.975,
        kv: Mode = "quant",
        layer_idx: int = 0,
        scale_dtype: torch.dtype = torch.float16,
        per_kv_head: bool = False,
        sparse_prompt: bool = True,
    ) -> None:
        super().__init__()
        check_cache_options(bits_important, bits_other, stream_gap, kv)
        self.choose, self.stream_gap, self.tau, self.kv = choose, stream_gap, tau, kv
        self.bits_important, self.bits_other = bits_important, bits_other
        self.layer_idx, self.scale_dtype = layer_idx, scale_dtype
        self.per_kv_head, self._heads = per_kv_head, 1
        self.sparse_prompt = sparse_prompt
        self.segments: list[Segment] = []
        self.coded = CodedTokens()
        self._mask: Tensor | None = None

    def note_mask(self, mask: Tensor) -> None:
        """The padding mask (B, L) of the call that follows."""
        self._mask = mask.bool()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes an empty tail."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends new tokens to the tail; returns the new tokens alone."""
        self._heads = key_states.shape[1] if self.per_kv_head else 1
        new = [heads_as_batch(t, self._heads) for t in (key_states, value_states)]
        if not self.is_initialized:
            self.lazy_initialization(*new)
        self.keys, self.values = (
            torch.cat(pair, 2) for pair in zip((self.keys, self.values), new, strict=True)
        )
        self.seen += key_states.shape[2]
        return key_states, value_states

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: CacheCall) -> tuple[Tensor, Tensor]:
        mask, self._mask = self._mask, None
        heads = self._heads
        q, k, v = (heads_as_batch(t, heads) for t in (q, k, v))
        if self.seen == k.shape[2]:
            mask = None if mask is None else mask.repeat_interleave(heads, 0)
            o, lse = self._prompt(q, k, v, mask, call)
        else:
            o, lse = self._everything(q, call)
            while self.keys.shape[2] >= self.stream_gap:
                self._stream(q, lse, call)
        return batch_as_heads(o, heads), batch_as_heads(lse, heads)

    def _everything(self, q: Tensor, call: CacheCall) -> tuple[Tensor, Tensor]:
        """Attention over the tail and all segments."""
        options: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap}
        parts = [attend_lse(q, self.keys, self.values, causal=True, **options)]
        for segment in self.segments:
            if isinstance(segment.keys, Tensor) and isinstance(segment.values, Tensor):
                real = segment.positions >= 0
                pair = segment.keys, segment.values
                parts.append(attend_lse(q, *pair, key_padding=real, **options))
        plain = parts[0] if len(parts) == 1 else merge(parts)
        return self.coded.attend(q, **options, prior=plain)

    def _prompt(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: CacheCall
    ) -> tuple[Tensor, Tensor]:
        shape = AttentionShape.of(q, k, causal=True)
        context = AttentionContext(
            q, k, v, shape, call.scale, layer_idx=self.layer_idx, key_padding=mask
        )
        with torch.no_grad():
            plan = DensePlan() if self.choose is None else self.choose(context)
        o, lse = attend_lse(
            q, k, v, plan=plan if self.sparse_prompt else DensePlan(), causal=True,
            scale=call.scale, softcap=call.softcap, key_padding=mask,
        )  # fmt: skip
        real = mask if mask is not None else k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
        important = real
        if isinstance(plan, TokenPlan):
            important = torch.zeros(k.shape[0], k.shape[2] + 1, dtype=torch.bool, device=k.device)
            slots = plan.slots()[:, 0]
            slots = torch.where(slots < 0, k.shape[2], slots).long()
            important = important.scatter(1, slots, True)[:, :-1] & real
        self.store(important, real)
        return o, lse

    def store(self, important: Tensor, real: Tensor | None = None) -> None:
        """Codes the first tokens of the tail, as one stream of at most two segments.

        Args:
            important: (B, n) bool, of the first n tokens of the tail.
            real: (B, n) bool, the tokens that are no padding.
        """
        count = important.shape[1]
        real = torch.ones_like(important) if real is None else real
        k, v = self.keys[:, :, :count], self.values[:, :, :count]
        first = self.seen - self.keys.shape[2]
        channel = value_channels(v, real, self.scale_dtype)
        groups = [(important & real, self.bits_important)]
        if self.kv == "quant":
            groups.append((~important & real, self.bits_other))
        for mask, bits in groups:
            if bool(mask.any()):
                self._add(self._segment(k, v, mask, bits, channel, first))
        self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()

    def _add(self, segment: Segment) -> None:
        self.segments.append(segment)
        if isinstance(segment.keys, TokenCodes) and isinstance(segment.values, TokenCodes):
            counts = (segment.positions >= 0).sum(1)
            self.coded.append(segment.keys, segment.values, counts)

    def _segment(
        self, k: Tensor, v: Tensor, mask: Tensor, bits: int, channel: Tensor, first: int
    ) -> Segment:
        slots = TokenPlan.from_mask(mask).slots()[:, 0]
        real = slots >= 0
        k, v = gather_tokens(k, slots[:, None]), gather_tokens(v, slots[:, None])
        positions = torch.where(real, slots + first, -1).int()
        if bits == 16:
            return Segment(positions, k, v)
        return Segment(
            positions,
            quantise_keys(k, bits, real, self.scale_dtype),
            quantise_values(v, bits, channel, real, self.scale_dtype),
        )

    def _stream(self, q: Tensor, lse: Tensor, call: CacheCall) -> None:
        """Codes the oldest `stream_gap` tokens of the tail by the last query's attention."""
        keys = self.keys[:, :, : self.stream_gap]
        row = q[:, :, -1:].float().unflatten(1, (keys.shape[1], -1))
        logits = (row @ keys.float().transpose(-1, -2)[:, :, None]).flatten(1, 2) * call.scale
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        scores = torch.exp(logits - lse[:, :, -1:, None].float())[:, :, 0].mean(1)
        count = mass_budget(scores, self.tau)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(1)
        self.store(rank < count[:, None])

    def nbytes(self) -> int:
        """Bytes of all that is stored, ranges, factors and positions included."""
        tensors = [t for segment in self.segments for t in segment.parts()]
        if self.is_initialized:
            tensors += [self.keys, self.values]
        once = {t.data_ptr(): t for t in tensors}  # segments of one stream share their factors
        return sum(t.numel() * t.element_size() for t in once.values())

    def reset(self) -> None:
        """Forgets everything."""
        self.segments, self.seen, self._mask = [], 0, None
        self.coded = CodedTokens()
        self.is_initialized = False

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some batch elements."""
        if self.is_initialized:
            lane = torch.arange(self._heads, device=self.device)
            indices = (indices.to(self.device)[:, None] * self._heads + lane).flatten()
            self.keys, self.values = self.keys[indices], self.values[indices]
            chosen = [segment.select(indices) for segment in self.segments]
            self.segments, self.coded = [], CodedTokens()
            for segment in chosen:
                self._add(segment)


def check_cache_options(bits_important: int, bits_other: int, stream_gap: int, kv: str) -> None:
    """Raises ValueError unless the options describe a mixed cache."""
    for name, bits in (("bits_important", bits_important), ("bits_other", bits_other)):
        if bits not in BITS:
            raise ValueError(f"{name}={bits}: expected one of {BITS}")
    check_count("stream_gap", stream_gap)
    check_choice("kv", kv, ("quant", "evict"))
