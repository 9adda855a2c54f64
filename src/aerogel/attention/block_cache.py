"""A KV cache that also holds one compressed key for every full block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aerogel.attention.cache import SelectorCacheLayer


class BlockCacheLayer(SelectorCacheLayer):
    """Keys, values, and gate keys of full blocks, each computed once.

    Keys before rotary embedding are kept only as long as their block is among the last two.

    Args:
        block: tokens of a block.

    Attributes:
        compressed: (B, Hkv, full blocks, gate_dim), or None.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block
        self.compressed: Tensor | None = None
        self._recent: Tensor | None = None  # (B, Hkv, tokens, d), from the start of a block
        self._noted = 0

    def append_keys(self, gate: Any, k_pre: Tensor, real: Tensor | None) -> None:
        """Notes new keys before rotary embedding.

        Args:
            gate: a `SeerDecodeGate`.
            k_pre: (B, Hkv, new tokens, d).
            real: (B, all tokens) bool, True at real tokens.

        Raises:
            ValueError: they do not follow those that were noted.
        """
        self._noted += k_pre.shape[2]
        if self._noted != self.get_seq_length():
            raise ValueError(
                f"k_pre: {self._noted} keys noted of {self.get_seq_length()} in the cache; attach "
                "the selector before the cache is filled"
            )
        recent = k_pre if self._recent is None else torch.cat([self._recent, k_pre], 2)
        begin = self._noted - recent.shape[2]
        have = 0 if self.compressed is None else self.compressed.shape[2]
        full = self._noted // self.block
        if full > have:
            tokens = slice(have * self.block, full * self.block)
            part = recent[:, :, tokens.start - begin : tokens.stop - begin]
            new = gate.compress(part, have, None if real is None else real[:, tokens])
            self.compressed = self._appended("compressed", self.compressed, new)
        self._recent = recent[:, :, max(0, (full - 1) * self.block - begin) :]

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.compressed = None if self.compressed is None else change(self.compressed)
        self._recent = None if self._recent is None else change(self._recent)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.compressed = self._recent = None
        self._noted = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; `tokens_to_remove` is their negative number.

        Raises:
            ValueError: the cut lies in a block whose keys before rotary embedding are gone.
        """
        left = self._noted + tokens_to_remove
        if tokens_to_remove < 0 and self._recent is not None and self.compressed is not None:
            begin = self._noted - self._recent.shape[2]
            if left < begin and left % self.block:
                raise ValueError(
                    f"crop: {-tokens_to_remove} tokens back is inside a block that is compressed "
                    f"already; expected at most {self._noted - begin}, or whole blocks"
                )
            self.compressed = self.compressed[:, :, : left // self.block]
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0 and self._recent is not None:
            begin = self._noted - self._recent.shape[2]
            self._recent = self._recent[:, :, : max(0, left - begin)]
            self._noted = left

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: element b continues the history of element ``beam_idx[b]``."""
        super().reorder_cache(beam_idx)
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some batch elements."""
        super().batch_select_indices(indices)
        self._each(lambda t: t[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch element."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda t: t.repeat_interleave(repeats, 0))
