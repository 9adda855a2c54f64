"""What Combiner's selector and its caches share: how a run of tokens becomes a summary.

Reference: Ren et al., arXiv 2107.05768, section 3.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from aerogel.arguments import check_choice, check_count, check_number
from aerogel.attention.selector import Selector
from aerogel.attention.summaries import POOLINGS, Pooling, Summaries, combiner_summary

Variant = Literal["fixed", "logsparse", "axial", "mixture"]
VARIANTS = ("fixed", "logsparse", "axial", "mixture")


class SummarisingSelector(Selector):
    """A selector that reads far tokens through summaries; its patterns are a subclass's.

    Args:
        variant: name of the pattern.
        seg_len: tokens of a block or row, at least 1, and 2 for "mixture".
        summary: how a region's queries and keys are pooled.
        share_summary_over_group: pool queries over the heads of a group too.
        relu: pool the positive parts of queries and keys.
        deepset_dim: size of a head, to pool learned maps of queries and keys; None for none.
        dropout: of attention inside the summaries, in training.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    def __init__(
        self,
        variant: Variant,
        seg_len: int,
        summary: Pooling,
        *,
        share_summary_over_group: bool = False,
        relu: bool = False,
        deepset_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        check_choice("summary", summary, POOLINGS)
        check_count("seg_len", seg_len, 2 if variant == "mixture" else 1)
        check_number("dropout", dropout, "[0, 1)")
        self.variant, self.seg_len, self.summary = variant, seg_len, summary
        self.share_summary_over_group, self.relu = share_summary_over_group, relu
        self.query_map = self.key_map = None
        if deepset_dim is not None:
            self.query_map, self.key_map = (
                nn.Linear(deepset_dim, deepset_dim, bias=False) for _ in range(2)
            )
        self.dropout = nn.Dropout(dropout)

    def summarise(
        self, q: Tensor, k: Tensor, v: Tensor, size: int, scale: float, real: Tensor | None = None
    ) -> Summaries:
        """Summaries of runs of `size` tokens by this selector's pooling and maps."""
        maps = (q.relu(), k.relu()) if self.relu else None
        if self.query_map is not None and self.key_map is not None:
            maps = (self.query_map(q).relu(), self.key_map(k).relu())
        return combiner_summary(
            q, k, v, size, self.summary, scale=scale, key_padding=real, pooled_from=maps,
            share_over_group=self.share_summary_over_group, dropout_p=self._dropped(),
        )  # fmt: skip

    def _dropped(self) -> float:
        return self.dropout.p if self.training else 0.0
