"""What KV cache layers share that hold less than all tokens, in an order of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class CountedCacheLayer(DynamicLayer):
    """Counts the tokens seen, kept or not, and follows beams by selecting batch elements.

    A subclass adds to `seen`, and overrides `batch_select_indices` for all that it holds.
    """

    is_croppable = False
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def get_seq_length(self) -> int:
        """All tokens seen, kept or not."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the padding mask: all tokens."""
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: element b continues the history of element ``beam_idx[b]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch element."""
        if self.is_initialized:
            index = torch.arange(self.keys.shape[0], device=self.device)
            self.batch_select_indices(index.repeat_interleave(repeats))
