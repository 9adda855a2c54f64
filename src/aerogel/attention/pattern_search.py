"""The offline search for every head's pattern, as MInference does it (arXiv 2407.02490)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.attention.engine import attend_lse
from aerogel.attention.hf import attach, detach
from aerogel.attention.minference import MInferenceSelector
from aerogel.attention.pattern_file import HeadPattern, PatternConfig
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.selector import AttentionContext, Selector

Metric = Literal["output_l2", "count", "recall"]

CANDIDATES = (
    HeadPattern("stream_llm", 100, 800),
    HeadPattern("vertical_and_slash", 30, 800),
    HeadPattern("vertical_and_slash", 100, 800),
    HeadPattern("vertical_and_slash", 100, 750),
    HeadPattern("vertical_and_slash", 500, 700),
    HeadPattern("vertical_and_slash", 3500, 100),
    HeadPattern("vertical_and_slash", 1000, 4096),
    HeadPattern("block_sparse", 100, 0),
)
_TOLERANCE = 1.1  # of the budget
_LARGE_ERROR = 5e-3  # of an output, as the authors count
_RECALL_ROW = 2500  # first row whose recalled mass counts, as the authors do


def search_patterns(
    model: nn.Module,
    input_ids: Tensor,
    candidates: Sequence[HeadPattern] = CANDIDATES,
    *,
    budget: float | None = None,
    metric: Metric = "output_l2",
    **options: Any,
) -> PatternConfig:
    """The candidate of least error for every head, on one long sample.

    Args:
        model: a transformers model.
        input_ids: (1, length) tokens of the sample.
        candidates: patterns to try.
        budget: kept share of the causal pairs; candidates above 1.1 times it take no part in a
            head, unless all are (then the sparsest wins).
        metric: "output_l2" (relative error of the head's output), "count" (outputs off by more
            than 0.005), or "recall" (attention mass that is missed).
        options: of `MInferenceSelector`, such as `last_q`.

    Raises:
        ValueError: no candidate, or an unknown metric.
    """
    if not candidates or metric not in ("output_l2", "count", "recall"):
        raise ValueError(f"{len(candidates)} candidates, metric={metric!r}: expected some, known")
    searcher = _Searcher(tuple(candidates), budget, metric, options)
    attach(model, searcher)
    try:
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False)
    finally:
        detach(model)
    layers = range(max(searcher.found) + 1)
    found = [searcher.found[layer] for layer in layers]
    return PatternConfig(
        tuple({h: pattern for h, (pattern, _) in layer.items()} for layer in found),
        tuple({h: score for h, (_, score) in layer.items()} for layer in found),
    )


class _Searcher(Selector):
    """Dense, but measures every candidate in passing."""

    slug = "minference-search"

    def __init__(
        self,
        candidates: tuple[HeadPattern, ...],
        budget: float | None,
        metric: Metric,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.candidates, self.budget, self.metric = candidates, budget, metric
        self.base = MInferenceSelector(**options)
        self.found: dict[int, dict[int, tuple[HeadPattern, float]]] = {}

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        common = {"causal": True, "scale": ctx.scale, "window": ctx.window}
        dense = attend_lse(ctx.q, ctx.k, ctx.v, **common)
        heads = torch.arange(ctx.shape.q_heads)
        scores, kept = [], []
        for pattern in self.candidates:
            plan = self.base.part(pattern).plan_heads(ctx, heads)
            sparse = attend_lse(ctx.q, ctx.k, ctx.v, plan=plan, **common)
            scores.append(self._score(dense, sparse))
            pairs = plan.row_counts(ctx.shape).float().sum((0, 2)) / plan.dims[0]
            kept.append((pairs / max(1, ctx.shape.pairs())).expand(ctx.shape.q_heads))
        self.found[ctx.layer_idx] = self._winners(torch.stack(scores), torch.stack(kept))
        return DensePlan()

    def _score(self, dense: tuple[Tensor, Tensor], sparse: tuple[Tensor, Tensor]) -> Tensor:
        """(heads,), the less the better."""
        error = (sparse[0] - dense[0]).float()
        if self.metric == "count":
            return (error.abs() > _LARGE_ERROR).float().sum((0, 2, 3))
        if self.metric == "recall":
            first = _RECALL_ROW if dense[1].shape[2] > _RECALL_ROW else 0
            return 1 - torch.exp(sparse[1] - dense[1])[:, :, first:].mean((0, 2))
        size = dense[0].float().square().sum((0, 2, 3))
        return (error.square().sum((0, 2, 3)) / size.clamp(min=1e-24)).sqrt()

    def _winners(self, scores: Tensor, kept: Tensor) -> dict[int, tuple[HeadPattern, float]]:
        if self.budget is not None:
            over = kept > _TOLERANCE * self.budget
            over &= ~over.all(0) | (kept > kept.amin(0))
            scores = scores.masked_fill(over, torch.inf)
        best = scores.argmin(0).tolist()
        return {
            head: (self.candidates[number], float(scores[number, head]))
            for head, number in enumerate(best)
        }
