"""Combiner: near tokens are read one by one, far regions through a summary of each.

Paper: Ren, Dai, Dai, Yang, Leskovec, Schuurmans and Dai, "Combiner: Full Attention Transformer with
Sparse Computation Cost", NeurIPS 2021, arXiv 2107.05768.

The idea: attention is an expectation over positions. It is factorised: a query picks near tokens
directly and whole regions through one key and one value each, where the value is itself an
expectation inside the region, computed once and shared by all queries. One softmax runs over tokens
and regions together, so every position keeps a weight above zero at the cost of a sparse pattern.

When to use it: training on long sequences where every earlier token may matter.
Costs and buys: per query B / 2 tokens and L / (2 B) summaries ("fixed"), log2 L summaries
("logsparse"), or a row and a column ("axial"); it must be trained with it, as the maximum over keys
means nothing to a model trained densely. Here 1,200 steps on text were too few for the summaries to
show (docs/evidence.md).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.arguments import check_choice, check_count
from aerogel.attention.bank_plan import Bank, BankPlan
from aerogel.attention.combiner_base import SummarisingSelector, Variant
from aerogel.attention.combiner_grid import axial_banks, mixture_banks
from aerogel.attention.key_list_plan import KeyListPlan
from aerogel.attention.plan import Plan
from aerogel.attention.selector import AttentionContext, add_selector, configured
from aerogel.attention.shape import AttentionShape
from aerogel.attention.summaries import Pooling, Summaries, others_plan, run_plan

RowSummary = Literal["proj", "wsum", "none"]
ROW_SUMMARIES = ("proj", "wsum", "none")
_NORM_EPS = 1e-6  # the authors' code's


@add_selector
class CombinerSelector(SummarisingSelector):
    """Direct tokens and summaries of all other visible positions, by one of four patterns.

    A call holds the whole sequence (`q_len` = `k_len`). A transformers model is built with it by
    ``config.aerogel_combiner`` (options of this class) before it is made: "aerogel:combiner" trains
    and reads prompts; `attach` and `AerogelCache` generate.

    Args:
        variant: "fixed" (own block; earlier blocks summarised), "logsparse" (aligned spans of the
            powers of two that make up the position), "axial" (own row; earlier rows seen through
            the own column) or "mixture" (own row and column; running summaries of the rest).
        seg_len: tokens B of a block, or W of a row; unused by "logsparse".
        summary: how a region's queries and keys are pooled.
        row_summary: key of a row in "axial": "proj" (learned), "wsum" (the row's attention over
            keys) or "none" (the plain key).
        exclude_own: "fixed", not causal: the own block is no region too (a true partition).
        share_summary_over_group: pool queries over the heads of a group too.
        head_dim, key_heads, d_model: sizes, for the learned parts ("proj", `deepset`).
        deepset: pool learned maps of queries and keys (linear without bias, relu).
        relu: pool the positive parts of queries and keys.
        dropout: of "proj", and of attention inside the summaries, in training.

    Raises:
        ValueError: an option is unknown or a size is missing.

    Reference:
        Ren et al., arXiv 2107.05768.
    """

    slug = "combiner"
    config_key = "aerogel_combiner"
    built_in = True
    differentiable = True

    def __init__(
        self,
        variant: Variant = "fixed",
        seg_len: int = 128,
        summary: Pooling = "max",
        row_summary: RowSummary = "proj",
        exclude_own: bool = True,
        share_summary_over_group: bool = False,
        head_dim: int | None = None,
        key_heads: int | None = None,
        d_model: int | None = None,
        deepset: bool = False,
        dropout: float = 0.0,
        relu: bool = False,
    ) -> None:
        sizes = {"head_dim": head_dim, "key_heads": key_heads, "d_model": d_model}
        for name, value in sizes.items():
            if value is not None:
                check_count(name, value)
        size = _known("head_dim", head_dim, "deepset") if deepset else None
        super().__init__(
            variant, seg_len, summary, share_summary_over_group=share_summary_over_group,
            relu=relu, deepset_dim=size, dropout=dropout,
        )  # fmt: skip
        check_choice("row_summary", row_summary, ROW_SUMMARIES)
        self.row_summary, self.exclude_own = row_summary, exclude_own
        self.row_out = self.row_norm = self.row_key = None
        if variant == "axial" and row_summary == "proj":
            width = _known("d_model", d_model, "row_summary='proj'")
            heads = _known("key_heads", key_heads, "row_summary='proj'")
            size = _known("head_dim", head_dim, "row_summary='proj'")
            self.row_out = nn.Linear(width, width, bias=False)
            self.row_norm = nn.LayerNorm(width, eps=_NORM_EPS)
            self.needs = frozenset({"layer_input"})  # type: ignore[misc]
            self.row_key = nn.Linear(width, heads * size, bias=False)

    def options(self) -> dict[str, Any]:
        if any(True for _ in self.parameters()):
            raise ValueError("row_summary='proj', deepset: learned parts are no options of a name")
        return {
            "variant": self.variant,
            "seg_len": self.seg_len,
            "summary": self.summary,
            "row_summary": self.row_summary,
            "exclude_own": self.exclude_own,
            "share_summary_over_group": self.share_summary_over_group,
            "relu": self.relu,
        }

    def on_attach(self, model: nn.Module) -> None:
        """Checks that the model was built with these options."""
        transformer: Any = model
        known = configured(self.slug, transformer.config.get_text_config(decoder=True))
        mine, built = self.options(), CombinerSelector(**known).options()
        if mine != built:
            raise ValueError(f"combiner: {mine}, but the model was built with {built}")

    def cache_layer(self, layer_idx: int, kv_heads: int) -> Any:
        from aerogel.attention.combiner_kv import CombinerCacheLayer

        return CombinerCacheLayer(self)

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        shape = ctx.shape
        if shape.q_len != shape.k_len:
            raise ValueError(
                f"combiner: {shape.q_len} queries on {shape.k_len} keys, expected the whole "
                "sequence; generate with past_key_values=AerogelCache(model) on an attached model, "
                "or through CombinerAttention"
            )
        if self.variant in ("logsparse", "axial") and not shape.causal:
            raise ValueError(f"variant={self.variant!r}: expected causal attention")
        if self.variant == "fixed":
            return BankPlan((self._own(shape, ctx), *self._blocks(ctx)))
        if self.variant == "logsparse":
            return BankPlan(tuple(self._spans(ctx)))
        if self.variant == "axial":
            return BankPlan(axial_banks(ctx, self.seg_len, self._row_keys, self._dropped()))
        return BankPlan(mixture_banks(ctx, self.seg_len, self._dropped()))

    def plan_decode(self, ctx: AttentionContext) -> Plan:
        return self.plan_prefill(ctx)

    def _own(self, shape: AttentionShape, ctx: AttentionContext) -> Bank:
        return Bank(run_plan(shape.k_len, self.seg_len, ctx.q.device))

    def _blocks(self, ctx: AttentionContext) -> list[Bank]:
        """Every earlier block (every other one, if not causal)."""
        size, shape = self.seg_len, ctx.shape
        found = self.summarise(ctx.q, ctx.k, ctx.v, size, ctx.scale, ctx.key_padding)
        count = found.k.shape[2]
        if count == 1 and (shape.causal or self.exclude_own):
            return []
        own = None if shape.causal else not self.exclude_own
        plan = others_plan(shape.k_len, size, ctx.q.device, own)
        return [found.bank(plan)]

    def _spans(self, ctx: AttentionContext) -> list[Bank]:
        """The binary partition of [0, i): pairs directly, longer spans as summaries."""
        length, device = ctx.shape.k_len, ctx.q.device
        banks = [Bank(run_plan(length, 2, device))]
        parts, firsts, first = [], [], 0
        for level in range(1, max(1, (length - 1).bit_length())):
            size = 1 << level
            whole = length // size * size
            real = None if ctx.key_padding is None else ctx.key_padding[:, :whole]
            q, k, v = (x[:, :, :whole] for x in (ctx.q, ctx.k, ctx.v))
            parts.append(self.summarise(q, k, v, size, ctx.scale, real))
            firsts.append(first)
            first += whole // size
        if parts:
            real = None
            if ctx.key_padding is not None:
                real = torch.cat([p.real for p in parts if p.real is not None], 1)
            keys, values = (torch.cat([p[i] for p in parts], 2) for i in (0, 1))  # type: ignore[misc]
            index = span_numbers(length, torch.tensor(firsts, device=device))
            plan = KeyListPlan.from_index(index[None, None])
            banks.append(Summaries(keys, values, real).bank(plan))
        return banks

    def _row_keys(self, ctx: AttentionContext, rows: Tensor, weighted: Tensor) -> Tensor:
        """(B, H, L, D): the key through which later rows see each row at a column."""
        if self.row_summary == "none":
            return ctx.k
        if self.row_summary == "wsum":
            return weighted
        if ctx.layer_input is None:
            raise ValueError("layer_input=None: expected the layer's input for row_summary='proj'")
        assert self.row_out is not None
        assert self.row_norm is not None
        assert self.row_key is not None
        seen = self.dropout(self.row_out(rows.transpose(1, 2).flatten(2)))
        key: Tensor = self.row_key(self.row_norm(seen + ctx.layer_input))
        return key.unflatten(-1, (ctx.k.shape[1], -1)).transpose(1, 2)


def span_numbers(length: int, firsts: Tensor) -> Tensor:
    """(length, levels) summaries that each position reads: level l + 1's span, -1 where bit clear.

    Args:
        length: positions.
        firsts: number of the first span of levels 1, 2, ...
    """
    place = torch.arange(length, device=firsts.device)[:, None]
    level = torch.arange(1, len(firsts) + 1, device=firsts.device)
    number = place >> level
    return torch.where(number & 1 == 1, firsts + number - 1, -1)


def _known(name: str, value: int | None, reason: str) -> int:
    if value is None:
        raise ValueError(f"{name}=None: expected a size for {reason}")
    return value
