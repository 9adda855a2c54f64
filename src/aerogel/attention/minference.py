"""MInference: long prompts read a few columns, diagonals or blocks, found anew for each prompt.

Paper: Jiang, Li, Zhang, Wu, Luo, Ahn, Han, Abdi, Li, Lin, Yang and Qiu, "MInference 1.0:
Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention", 2024,
arXiv 2407.02490.

The idea: in long prompts a head's attention has one of three shapes, which is the head's own:
first tokens and a local window (A-shape), some columns and some diagonals (vertical-slash), or
scattered blocks. The shape is found once per model; where its lines lie depends on the prompt and
is estimated from the attention of the last 64 queries, or from pooled queries and keys. Softmax
over the chosen keys is exact.

When to use it: prompts of many thousand tokens on a trained model, without training anything.
Costs and buys: one strip of 64 rows of attention per head, then a fraction of the pairs; decoding
stays dense. Earlier rows' keys are chosen with knowledge of the prompt's end.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.arguments import check_count, check_number
from aerogel.attention.mix_plan import HeadMixPlan
from aerogel.attention.pattern_file import HeadPattern, PatternConfig, load_patterns
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.prompt_patterns import (
    AShapeSelector,
    PooledBlockSelector,
    PromptSelector,
    VerticalSlashSelector,
    check_sizes,
)
from aerogel.attention.selector import AttentionContext, add_selector
from aerogel.attention.selector_file import model_fingerprint
from aerogel.attention.shape import AttentionShape
from aerogel.attention.span_plan import SpanPlan

_NEARLY_ALL = 0.85  # of the causal pairs: dense attention is faster from here on


@add_selector
class MInferenceSelector(PromptSelector):
    """Every head by its own pattern.

    Args:
        config: patterns per layer and head: a `PatternConfig`, a path to the authors' JSON, or
            None for vertical-slash with 1000 columns and 6096 diagonals everywhere. Heads that a
            configuration leaves out get that too.
        starting_layer: layers below it are dense.
        ratio: scales the columns and diagonals of every head.
        dense_below: prompts up to so many tokens are dense; default: heads whose plan keeps 85 % of
            the pairs are.
        last_q: see `VerticalSlashSelector`.
        force_first: the same.
        force_local: the same.
        block: the same.

    Reference:
        Jiang et al., arXiv 2407.02490.
    """

    slug = "minference"

    def __init__(
        self,
        config: PatternConfig | str | Path | list[Any] | None = None,
        starting_layer: int = -1,
        ratio: float = 1.0,
        dense_below: int | None = None,
        last_q: int = 64,
        force_first: int = 30,
        force_local: int = 100,
        block: int = 64,
    ) -> None:
        super().__init__()
        check_number("ratio", ratio, "(0, inf)")
        check_count("starting_layer", starting_layer, -1)
        if dense_below is not None:
            check_count("dense_below", dense_below, 0)
        check_sizes(last_q, force_first, force_local, block)
        if isinstance(config, (str, Path)):
            config = load_patterns(config)
        if isinstance(config, list):
            config = PatternConfig.from_json(config)
        if config is not None and not isinstance(config, PatternConfig):
            raise TypeError(f"config must be a PatternConfig, a path or its JSON, got {config!r}")
        self.config, self.starting_layer, self.ratio = config, starting_layer, ratio
        self.dense_below, self.last_q = dense_below, last_q
        self.force_first, self.force_local, self.block = force_first, force_local, block
        self._parts: dict[HeadPattern, PromptSelector] = {}
        self._warned = False

    def options(self) -> dict[str, Any]:
        return {
            "config": None if self.config is None else self.config.to_json(),
            "starting_layer": self.starting_layer,
            "ratio": self.ratio,
            "dense_below": self.dense_below,
            "last_q": self.last_q,
            "force_first": self.force_first,
            "force_local": self.force_local,
            "block": self.block,
        }

    def on_attach(self, model: nn.Module) -> None:
        """Checks the configuration's layers against the model's."""
        layers = model_fingerprint(model)["layers"]
        if self.config is not None and len(self.config.layers) != layers:
            raise ValueError(
                f"config: {len(self.config.layers)} layers, but the model has {layers}"
            )

    def patterns(self, layer: int, heads: int) -> list[HeadPattern]:
        """The pattern of every head of a layer.

        Raises:
            ValueError: the configuration has other layers or heads.
        """
        if self.config is None:
            return [HeadPattern()] * heads
        return self.config.layer(layer, heads)

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        short = self.dense_below is not None and ctx.shape.k_len <= self.dense_below
        if ctx.layer_idx < self.starting_layer or short:
            return DensePlan()
        if ctx.window is not None and not self._warned:
            self._warned = True
            warnings.warn("MInference in a layer with a sliding window keeps both", stacklevel=2)
        return super().plan_prefill(ctx)

    def plan_heads(self, ctx: AttentionContext, heads: Tensor) -> Plan:
        groups: dict[HeadPattern, list[int]] = {}
        patterns = self.patterns(ctx.layer_idx, ctx.shape.q_heads)
        for head in heads.tolist():
            groups.setdefault(patterns[head], []).append(head)
        parts: dict[tuple[int, ...], Plan] = {}
        for pattern, numbers in groups.items():
            chosen = torch.tensor(numbers, device=ctx.q.device)
            plan = self.part(pattern).plan_heads(ctx, chosen)
            if self.dense_below is None and _keeps_nearly_all(plan, ctx.shape):
                plan = DensePlan()
            parts[tuple(numbers)] = plan
        if len(parts) == 1:
            return next(iter(parts.values()))
        return HeadMixPlan.of(parts)

    def part(self, pattern: HeadPattern) -> PromptSelector:
        """The selector of a pattern, with this one's options."""
        if pattern not in self._parts:
            self._parts[pattern] = self._made(pattern)
        return self._parts[pattern]

    def _made(self, pattern: HeadPattern) -> PromptSelector:
        if pattern.kind == "stream_llm":
            return AShapeSelector(pattern.vertical, pattern.slash)
        if pattern.kind == "block_sparse":
            return PooledBlockSelector(max(1, pattern.vertical), self.block)
        return VerticalSlashSelector(
            round(pattern.vertical * self.ratio),
            round(pattern.slash * self.ratio),
            self.last_q,
            self.force_first,
            self.force_local,
            self.block,
        )


def _keeps_nearly_all(plan: Plan, shape: AttentionShape) -> bool:
    """Whether dense attention reads hardly more; an estimate from the plan's tiles."""
    if isinstance(plan, SpanPlan):
        reach = (shape.positions() + 1).clamp(max=int(plan.sink[0]) + int(plan.window[0]))
        return int(reach.sum()) >= _NEARLY_ALL * shape.pairs()
    pairs = 0
    for part in plan.passes(shape):
        ranges = part.ranges
        reach = ranges.last_positions(ranges.row, shape) + 1
        cut = torch.minimum(ranges.start + ranges.length, reach).clamp(max=shape.k_len)
        pairs += int((cut - ranges.start).clamp(min=0).sum()) * ranges.block_q
        pairs += ranges.token.numel() * ranges.block_q
    planes = plan.dims[0] * plan.dims[1]
    return pairs >= _NEARLY_ALL * shape.pairs() * planes
