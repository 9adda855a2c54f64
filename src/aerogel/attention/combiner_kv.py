"""Combiner's KV cache in transformers models that were built with it.

Reference: Ren et al., arXiv 2107.05768. Needs transformers 5 or later.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.attention.attending_cache import AttendingCache, CacheCall
from aerogel.attention.combiner_base import SummarisingSelector
from aerogel.attention.combiner_cache import CombinerCache, attend_by_blocks, attend_by_spans
from aerogel.attention.counted_cache import CountedCacheLayer
from aerogel.attention.engine import attend_lse
from aerogel.attention.selector import AttentionContext, select
from aerogel.attention.shape import AttentionShape


class CombinerCacheLayer(AttendingCache, CountedCacheLayer):
    """The variant "fixed" keeps one block of raw tokens and a summary of each block before.

    The other variants keep all raw tokens; "axial" and "mixture" attend anew for every step.

    Args:
        selector: of the model.
    """

    refused: ClassVar[tuple[str, ...]] = ("window", "softcap")
    kept: ClassVar[str] = "summaries do not say what their tokens were"

    def __init__(self, selector: SummarisingSelector) -> None:
        super().__init__()
        self.selector, self.state = selector, CombinerCache()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Notes type and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def note_padding(self, padded: Tensor) -> None:
        """Left padding (B,) in tokens.

        Raises:
            ValueError: there is some: blocks count from the first token of all sequences.
        """
        if bool((padded > 0).any()):
            raise ValueError(
                "attention_mask: left padding does not go with Combiner's cache, whose blocks "
                "count from the first token; generate sequences of equal length, or one by one"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Counts new tokens, which `attend` stores with their queries; returns them alone."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        return key_states, value_states

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: CacheCall) -> tuple[Tensor, Tensor]:
        if self.selector.variant == "fixed":
            return attend_by_blocks(self.selector, self.state, q, k, v, call.scale)
        if self.selector.variant == "logsparse":
            return attend_by_spans(self.selector, self.state, q, k, v, call.scale)
        rows = q.shape[2]
        q, k, v = self.state.append((q, k, v))
        ctx = AttentionContext(q, k, v, AttentionShape.of(q, k, causal=True), call.scale)
        o, lse = attend_lse(q, k, v, plan=select(self.selector, ctx), scale=call.scale, causal=True)
        return o[:, :, -rows:], lse[:, :, -rows:]

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.seen, self.state = 0, CombinerCache()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some batch elements."""
        if self.is_initialized:
            self.state.choose(indices.to(self.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch element."""
        if self.state.raw or self.state.finished is not None:
            held = self.state.raw[0] if self.state.raw else self.state.finished[0]  # type: ignore[index]
            index = torch.arange(held.shape[0], device=held.device)
            self.state.choose(index.repeat_interleave(repeats))
