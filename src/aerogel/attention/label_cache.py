"""KV caches with labels beside the keys, and with the keys in slow memory."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from aerogel.attention.attending_cache import AttendingCache, CacheCall
from aerogel.attention.cache import SelectorCacheLayer
from aerogel.attention.engine import attend_lse
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.plan import DensePlan, Plan
from aerogel.kernels import KeyRule


class Labeller(Protocol):
    """What the caches ask of a selector.

    Attributes:
        heavy_tokens: keys that a query reads.
        storage: device of offloaded keys and values.
    """

    heavy_tokens: int
    storage: str

    def is_dense(self, layer: int) -> bool:
        """Whether a layer reads everything."""

    def labels_of(self, k: Tensor, layer: int, q_heads: int) -> dict[str, Tensor]:
        """What is kept of keys (B, Hkv, L, D), by name: (B, heads, L, ...)."""

    def choose(
        self,
        q: Tensor,
        side: dict[str, Tensor],
        layer: int,
        kv_heads: int,
        rule: KeyRule,
        key_padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The best keys of queries (B, Hq, Lq, D) by labels; see `kernels.choose_by_labels`."""


class LabelCacheLayer(SelectorCacheLayer):
    """Keys, values, and the labels of every key as side state.

    Args:
        selector: says what a label is.
    """

    keys: Any
    values: Any

    def __init__(self, selector: Labeller) -> None:
        super().__init__()
        self.selector = selector

    def append_labels(self, keys: Tensor, layer: int, q_heads: int) -> None:
        """Labels of those of all `keys` (B, Hkv, L, D) that have none yet."""
        have = self.side["label"].shape[-2] if "label" in self.side else 0
        if have < keys.shape[2]:
            new = self.selector.labels_of(keys[:, :, have:], layer, q_heads)
            for name, part in new.items():
                self.append_side(name, part)


class FetchedRows(NamedTuple):
    """Rows of the slow cache in fast memory.

    Attributes:
        rows: (B, Hq, n) int64, -1 for none.
        keys, values: (B, Hq, n, D); arbitrary where there is none.
    """

    rows: Tensor
    keys: Tensor
    values: Tensor


class OffloadedCacheLayer(AttendingCache, LabelCacheLayer):
    """All keys and values in slow memory, labels and the rows of one step in fast memory.

    While a layer works, the rows that the next one will want are chosen from a foretold query and
    copied in the background. `attend` replaces the engine's call on this layer.

    Args:
        selector: says what a label is and where the keys lie.
        layer_idx: of the layer in its model.
    """

    def __init__(self, selector: Labeller, layer_idx: int) -> None:
        super().__init__(selector)
        self.layer_idx, self.storage = layer_idx, torch.device(selector.storage)
        self.padded: Tensor | None = None
        self.foretold = 0
        self._coming: tuple[int, Future[FetchedRows]] | None = None

    def note_padding(self, padded: Tensor) -> None:
        """Left padding (B,) int64 in tokens; before the first update."""
        if not self.is_initialized:
            self.padded = padded.long() if bool((padded > 0).any()) else None

    def note_next(self, query: Tensor | None, following: Any) -> None:
        """Begins to fetch what the next layer will want.

        Args:
            query: (B, Hq, 1, D) foretold query of the next layer after rotary embedding, or None
                where it cannot be told.
            following: the next layer of the cache.
        """
        if query is None or not isinstance(following, OffloadedCacheLayer):
            return
        if not self.selector.is_dense(following.layer_idx) and following.is_initialized:
            following.fetch_for(query)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends to the slow memory; returns the new keys and values alone."""
        super().update(key_states.to(self.storage), value_states.to(self.storage))
        return key_states, value_states

    def fetch_for(self, query: Tensor) -> None:
        """Chooses rows by a query (B, Hq, 1, D) and begins to copy them."""
        seen, device = self.get_seq_length(), query.device
        index = self._choose(query, seen, self.selector.heavy_tokens - 1)
        self._coming = (seen, _copier().submit(self.gather, index, device))

    def gather(self, index: Tensor, device: torch.device) -> FetchedRows:
        """Rows of the slow memory: index (B, Hq, n), -1 for none."""
        heads = self.keys.shape[1]
        rows = index.clamp(min=0).to(self.storage).unflatten(1, (heads, -1)).flatten(2)
        found = []
        for whole in (self.keys, self.values):
            wide = rows[..., None].expand(-1, -1, -1, whole.shape[-1])
            part = whole.gather(2, wide).unflatten(2, (-1, index.shape[2])).flatten(1, 2)
            found.append(part.to(device, non_blocking=True))
        return FetchedRows(index, *found)

    def _choose(self, query: Tensor, length: int, count: int) -> Tensor:
        """(B, Hq, n) the best of the first `length` rows by their labels; -1 for none."""
        selector = self.selector
        side = {name: part[..., :length, :] for name, part in self.side.items()}
        padding = None
        if self.padded is not None:
            padding = torch.arange(length, device=query.device) >= self.padded[:, None]
        rule = KeyRule(min(count, length), causal=False, keep_own=False)
        keys, found = selector.choose(
            query, side, self.layer_idx, self.keys.shape[1], rule, padding
        )
        keys, found = keys[:, :, 0].long(), found[:, :, 0]
        return keys.masked_fill(
            torch.arange(keys.shape[-1], device=keys.device) >= found[..., None], -1
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: CacheCall) -> tuple[Tensor, Tensor]:
        """Prompts, dense layers and calls of several rows read the whole slow memory.

        A single row reads the foretold rows and its own key. Without a foretold query it chooses
        by its own.
        """
        coming, self._coming = self._coming, None
        seen = self.get_seq_length()
        sparse = not self.selector.is_dense(self.layer_idx)
        before = self.side["label"].shape[-2] if "label" in self.side else 0
        plan: Plan = DensePlan()
        causal, padding = True, None
        if sparse and q.shape[2] == 1 and before == seen - 1 and seen > 1:
            fetched = self._rows(q, seen - 1, coming)
            keys = torch.cat([fetched.keys, self._per_query_head(k, q)], 2)
            values = torch.cat([fetched.values, self._per_query_head(v, q)], 2)
            real = torch.nn.functional.pad(fetched.rows >= 0, (0, 1), value=True)
            if not bool(real.all()):
                plan = KeyListPlan.from_bitmask(real[:, :, None])
            causal = False
        elif seen == k.shape[2]:
            keys, values = k, v
        else:
            keys, values = self.keys.to(q.device), self.values.to(q.device)
        if causal and self.padded is not None:
            padding = torch.arange(seen, device=q.device) >= self.padded[:, None].to(q.device)
        if sparse:
            fresh = self.selector.labels_of(k, self.layer_idx, q.shape[1])
            for name, part in fresh.items():
                self.append_side(name, part)
        return attend_lse(
            q, keys, values, plan=plan, causal=causal, key_padding=padding, scale=call.scale,
            softcap=call.softcap, validate=False,
        )  # fmt: skip

    def _rows(
        self, q: Tensor, seen: int, coming: tuple[int, Future[FetchedRows]] | None
    ) -> FetchedRows:
        if coming is not None and coming[0] == seen:
            self.foretold += 1
            return coming[1].result()
        return self.gather(self._choose(q, seen, self.selector.heavy_tokens - 1), q.device)

    @staticmethod
    def _per_query_head(new: Tensor, q: Tensor) -> Tensor:
        """The one new row of every key head for each query head of its group."""
        return new.repeat_interleave(q.shape[1] // new.shape[1], 1)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._coming = self.padded = None

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; `tokens_to_remove` is their negative number."""
        self._coming = None
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: element b continues the history of element ``beam_idx[b]``."""
        self._coming = None
        super().reorder_cache(beam_idx)
        self._pick(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some batch elements."""
        self._coming = None
        super().batch_select_indices(indices)
        self._pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch element."""
        self._coming = None
        super().batch_repeat_interleave(repeats)
        if self.padded is not None:
            self.padded = self.padded.repeat_interleave(repeats)

    def _pick(self, index: Tensor) -> None:
        if self.padded is not None:
            self.padded = self.padded[index.to(self.padded.device)]


@lru_cache(maxsize=1)
def _copier() -> ThreadPoolExecutor:
    """One thread that copies for all layers."""
    return ThreadPoolExecutor(1, "aerogel-offload")
