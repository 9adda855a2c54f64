"""Combiner's KV cache in transformers models that were built with it.

Reference: Ren et al., arXiv 2107.05768. Needs transformers 5 or later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aerogel.attention.combiner import CombinerSelector
from aerogel.attention.combiner_cache import CombinerCache, attend_by_blocks, attend_by_spans
from aerogel.attention.counted_cache import CountedCacheLayer
from aerogel.attention.engine import attend
from aerogel.attention.selector import AttentionContext, select
from aerogel.attention.shape import AttentionShape


class CombinerCacheLayer(CountedCacheLayer):
    """The variant "fixed" keeps one block of raw tokens and a summary of each block before.

    The other variants keep all raw tokens; "axial" and "mixture" attend anew for every step.

    Args:
        selector: of the model.
    """

    def __init__(self, selector: CombinerSelector) -> None:
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
        """Attention after `update`: q (B, Hq, Lq, D), and the new k and v.

        Raises:
            ValueError: a sliding window, softcap, sink or dropout.
        """
        others = {"window": window, "softcap": softcap, "sink_logit": sink_logit}
        given = [name for name, value in others.items() if value is not None]
        if given or dropout_p:
            raise ValueError(f"{given}, dropout_p={dropout_p}: expected none with Combiner's cache")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if self.selector.variant == "fixed":
            return attend_by_blocks(self.selector, self.state, q, k, v, scale)
        if self.selector.variant == "logsparse":
            return attend_by_spans(self.selector, self.state, q, k, v, scale)
        rows = q.shape[2]
        q, k, v = self.state.append((q, k, v))
        ctx = AttentionContext(q, k, v, AttentionShape.of(q, k, causal=True), scale)
        out = attend(q, k, v, plan=select(self.selector, ctx), scale=scale, causal=True)
        assert isinstance(out, Tensor)
        return out[:, :, -rows:]

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.seen, self.state = 0, CombinerCache()

    def crop(self, tokens_to_remove: int) -> None:
        """A summary does not say what its tokens were.

        Raises:
            ValueError: a token would have to be removed.
        """
        if tokens_to_remove:
            raise ValueError("crop: summaries cannot give back the tokens they stand for")

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
