"""MoA: every head has its own span, and some spans grow with the input.

Paper: Fu, Huang, Ning, Zhang, Huang, Wu, Chen, Guo, Zhang, Yan, Zhao, Dai, Yang and Wang, "MoA:
Mixture of Sparse Attention for Automatic Large Language Model Compression", 2024, arXiv 2406.14909
(COLM 2025: "Mixture of Attention Spans").

The idea: a head keeps ``alpha + beta * length`` tokens: a few first ones and a window. Which alpha
and beta each head gets is found automatically (`aerogel.search.SpanSearch`): gradients say how much
the loss would feel each attention value's absence, an integer program spends a memory budget on the
heads that need it, and an unseen length picks the plan. No training.

When to use it: serving a trained model with a smaller KV cache of a size known beforehand.
Costs and buys: a profile of a few sequences and seconds of integer programming, once per model;
then prefill and decoding read, and the cache holds, the chosen share of the keys. What lies
outside a head's span is lost to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.arguments import check_count, check_number
from aerogel.atomic import write_atomic
from aerogel.attention.plan import Plan
from aerogel.attention.selector import AttentionContext, Selector, add_selector
from aerogel.attention.selector_file import model_fingerprint
from aerogel.attention.span_plan import SpanPlan


@dataclass(frozen=True, order=True)
class ElasticSpan:
    """A span of ``alpha + beta * length`` tokens.

    Args:
        alpha: tokens; may be negative.
        beta: share of the length, in [0, 1].

    Raises:
        ValueError: beta is out of range.
    """

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha)
        check_number("beta", self.beta, "[0, 1]")

    def tokens(self, length: int) -> float:
        """The span at a length."""
        return self.alpha + self.beta * length

    def cache_tokens(self, length: int, block: int) -> int:
        """Keys kept at a length: the span, at most the length, at least two blocks, rounded up."""
        kept = max(2 * block, min(int(self.tokens(length)), length))
        return -(-kept // block) * block


@dataclass(frozen=True)
class MoAPlan:
    """The span of every head of every layer.

    Args:
        alphas, betas: layers of heads: key heads, or query heads where each has its own.
        block: tokens per block.
        sink: first tokens that every head keeps, whole blocks.

    Raises:
        ValueError: the two differ in shape, or a size is out of range.
    """

    alphas: tuple[tuple[float, ...], ...]
    betas: tuple[tuple[float, ...], ...]
    block: int = 64
    sink: int = 64

    def __post_init__(self) -> None:
        shapes = [[len(layer) for layer in part] for part in (self.alphas, self.betas)]
        if shapes[0] != shapes[1] or not shapes[0] or len(set(shapes[0])) != 1:
            raise ValueError(
                f"alphas, betas: heads per layer {shapes[0]} and {shapes[1]}, expected equal"
            )
        check_count("block", self.block)
        check_count("sink", self.sink, 0)
        if self.sink % self.block:
            raise ValueError(
                f"block={self.block}, sink={self.sink}: expected a multiple of the block"
            )
        _ = self.rules

    @classmethod
    def of(cls, rules: Sequence[Sequence[ElasticSpan]], block: int = 64, sink: int = 64) -> MoAPlan:
        """From the rule of every head of every layer."""
        alphas = tuple(tuple(rule.alpha for rule in layer) for layer in rules)
        betas = tuple(tuple(rule.beta for rule in layer) for layer in rules)
        return cls(alphas, betas, block, sink)

    @classmethod
    def uniform(
        cls, rule: ElasticSpan, layers: int, heads: int, block: int = 64, sink: int = 64
    ) -> MoAPlan:
        """The same rule for all heads: first tokens and one window, as StreamingLLM."""
        return cls.of([[rule] * heads] * layers, block, sink)

    @property
    def rules(self) -> list[list[ElasticSpan]]:
        """The rule of every head of every layer."""
        return [
            [ElasticSpan(a, b) for a, b in zip(*layer, strict=True)]
            for layer in zip(self.alphas, self.betas, strict=True)
        ]

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        return len(self.alphas[0])

    def spans(self, length: int) -> Tensor:
        """(layers, heads) float64: the span of each rule at a length, in tokens."""
        return torch.tensor(
            [[rule.tokens(length) for rule in layer] for layer in self.rules], dtype=torch.float64
        )

    def cache_sizes(self, length: int, max_new: int = 1024) -> Tensor:
        """(layers, heads) int64 tokens that each head keeps, its first ones included.

        A prompt of `length` tokens and up to `max_new` more: the span at their sum, at most that
        sum, at least two blocks, in whole blocks.

        Raises:
            ValueError: a head has no span at this length.
        """
        total = length + max_new
        self._check(total)
        return torch.tensor(
            [[rule.cache_tokens(total, self.block) for rule in layer] for layer in self.rules]
        )

    def density(self, length: int, max_new: int = 0) -> float:
        """Mean share of the keys that heads keep."""
        sizes = self.cache_sizes(length, max_new).clamp(max=length + max_new)
        return float(sizes.double().mean()) / (length + max_new)

    def save(self, path: str | Path) -> None:
        """Writes the authors' format: {"alphas": [[...]], "betas": [[...]]}."""
        content = {"alphas": [list(a) for a in self.alphas], "betas": [list(b) for b in self.betas]}
        write_atomic(Path(path), json.dumps(content).encode())

    @classmethod
    def load(cls, path: str | Path, block: int = 64, sink: int = 64) -> MoAPlan:
        """Reads that format.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            parts = [
                tuple(tuple(float(x) for x in layer) for layer in content[name])
                for name in ("alphas", "betas")
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected alphas and betas, lists of lists") from error
        return cls(parts[0], parts[1], block, sink)

    def _check(self, length: int) -> None:
        for number, head in (self.spans(length) <= 0).nonzero().tolist():
            rule = self.rules[number][head]
            raise ValueError(
                f"layer {number}, head {head}: span {rule.alpha} + {rule.beta} * {length} "
                f"= {rule.tokens(length)}, expected above 0"
            )


@add_selector
class MoASelector(Selector):
    """Sinks and a window per head, sized for the prompt and the tokens that may follow.

    In a prompt, windows are whole blocks (up to a block less than the cache holds); a step reads
    exactly what the cache holds. Keys keep their true positions.

    Args:
        plan: the spans, or the path of a plan file.
        max_new: tokens that may follow a prompt.
        length: prompt length that sizes are made for; default that of each cache's first tokens,
            which a prompt in chunks outgrows after `max_new` more.
        block: of a plan that is read from a file.
        sink: the same.

    Reference:
        Fu et al., arXiv 2406.14909.
    """

    slug = "moa"
    needs = frozenset({"cache", "calibration"})

    def __init__(
        self,
        plan: MoAPlan | str | Path | dict[str, Any],
        max_new: int = 1024,
        length: int | None = None,
        block: int = 64,
        sink: int = 64,
    ) -> None:
        super().__init__()
        check_count("max_new", max_new, 0)
        check_count("block", block)
        check_count("sink", sink, 0)
        if length is not None:
            check_count("length", length)
        if isinstance(plan, dict):
            alphas, betas = (tuple(tuple(a) for a in plan[n]) for n in ("alphas", "betas"))
            plan = MoAPlan(alphas, betas, block, sink)
        elif not isinstance(plan, MoAPlan):
            plan = MoAPlan.load(plan, block, sink)
        self.plan, self.max_new, self.length = plan, max_new, length

    def options(self) -> dict[str, Any]:
        plan = {"alphas": self.plan.alphas, "betas": self.plan.betas}
        return {
            "plan": plan,
            "max_new": self.max_new,
            "length": self.length,
            "block": self.plan.block,
            "sink": self.plan.sink,
        }

    def on_attach(self, model: nn.Module) -> None:
        """Checks the plan's layers and heads against the model's."""
        sizes = model_fingerprint(model)
        have = (len(self.plan.alphas), self.plan.heads)
        wanted = [(sizes["layers"], sizes[heads]) for heads in ("kv_heads", "q_heads")]
        if have not in wanted:
            raise ValueError(
                f"plan: {have[0]} layers of {have[1]} heads, expected {wanted[0][0]} layers of "
                f"{wanted[0][1]} or {wanted[1][1]}"
            )

    def span(self, layer: int, length: int, granularity: Any = "block") -> SpanPlan:
        """A layer's spans for prompts of a length: in blocks, or in tokens as steps read them."""
        if layer >= len(self.plan.alphas):
            raise ValueError(f"layer {layer}: the plan has {len(self.plan.alphas)} layers")
        sizes = self.plan.cache_sizes(length, self.max_new)[layer]
        sink = sizes.clamp(max=self.plan.sink)
        unit = self.plan.block if granularity == "block" else 1
        zeros = torch.zeros(len(sizes), dtype=torch.int32)
        return SpanPlan(
            sink=(sink // unit).int(),
            window=((sizes - sink) // unit).int(),
            stride=zeros,
            phase=zeros,
            dense=zeros.bool(),
            block=self.plan.block,
            granularity=granularity,
        )

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        return self._placed(ctx, "block")

    def plan_decode(self, ctx: AttentionContext) -> Plan:
        return self._placed(ctx, "token")

    def _placed(self, ctx: AttentionContext, granularity: str) -> Plan:
        length = ctx.shape.k_len if self.length is None else self.length
        if ctx.shape.k_len > length + self.max_new:
            raise ValueError(
                f"{ctx.shape.k_len} keys, but spans are made for {length} and {self.max_new} more; "
                "make the selector with a larger length or max_new"
            )
        span = self.span(ctx.layer_idx, length, granularity)
        first = ctx.first_keys()
        placed = SpanPlan(
            span.sink, span.window, span.stride, span.phase, span.dense, span.block,
            span.granularity, first,
        )  # fmt: skip
        return placed.to(ctx.q.device)

    def cache_layer(self, layer_idx: int, kv_heads: int) -> Any:
        from aerogel.attention.cache import SpanCacheLayer

        def sized(length: int) -> tuple[SpanPlan, SpanPlan, int]:
            step, prompt = (self.span(layer_idx, length, unit) for unit in ("token", "block"))
            return step, prompt, length + self.max_new

        if self.length is None:
            return SpanCacheLayer(SpanPlan.uniform(0, 1), kv_heads, sized=sized)
        step, prompt, longest = sized(self.length)
        return SpanCacheLayer(step, kv_heads, prompt=prompt, longest=longest)
