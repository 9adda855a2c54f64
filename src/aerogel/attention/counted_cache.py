"""What KV cache layers share that hold less than all tokens, in an order of their own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class CountedCacheLayer(DynamicLayer):
    """Counts the tokens seen, kept or not, and follows beams by selecting batch elements.

    A subclass adds to `seen`, overrides `batch_select_indices` for all that it holds, and says in
    `kept` why it cannot give tokens back.
    """

    is_croppable = False
    kept: ClassVar[str] = "tokens are not kept one by one"
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

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing can be removed.

        Raises:
            ValueError: a token would have to be removed.
        """
        if tokens_to_remove:
            raise ValueError(f"crop: {tokens_to_remove} tokens, expected 0; {self.kept}")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: element b continues the history of element ``beam_idx[b]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch element."""
        if self.is_initialized:
            index = torch.arange(self.keys.shape[0], device=self.device)
            self.batch_select_indices(index.repeat_interleave(repeats))
