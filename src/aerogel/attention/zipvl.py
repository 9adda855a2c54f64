"""ZipVL: a prompt's layers attend among the few tokens that hold most of the attention.

Paper: He, Chen, Liu, Shao, Zhou, Zhang and Zhuang, "ZipVL: Efficient Large Vision-Language Models
with Dynamic Token Sparsification and KV Cache Compression", 2024, arXiv 2410.08584.

The idea: a tenth of the rows probe where a layer's attention goes. The smallest number of tokens
that hold a share tau of it is the layer's budget, for this prompt; attention runs among so many
tokens, those most attended to per row that could see them; the others pass through on the residual
path and may be chosen again one layer later. The same tokens are stored in 4 bits in the KV cache,
the others in 2.

When to use it: prompts of thousands of tokens on a trained decoder, most of them from pictures, and
a cache that does not fit. Costs and buys: the probing rows' attention, then (p / n) ** 2 of the
pairs; a cache five times smaller than float16. Nothing is trained. Earlier rows are chosen with
knowledge of the prompt's end.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.arguments import check_choice, check_count, check_number
from aerogel.attention.hf import attach, detach
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.probe import mass_budget, probe_rows, probe_scores
from aerogel.attention.selector import AttentionContext, Selector, add_selector
from aerogel.attention.token_plan import TokenPlan, heads_as_batch


@add_selector
class ZipVLSelector(Selector):
    """The tokens among which a layer's prompt attends; decoding reads all of the cache.

    A prompt in one piece is sparse; later pieces of a prompt in chunks read everything.

    Args:
        tau: share of the attention that the chosen tokens hold, in (0, 1].
        probe_recent: share of the rows that probe, from the prompt's end.
        probe_random: share drawn from the other rows.
        probe_max: probing rows at most.
        keep_last: tokens at the end that are always chosen.
        keep_first: tokens at the start that are always chosen.
        normalizer: a token's attention is divided by the number of "probe" rows that see it, or of
            all rows ("full").
        seed: draws the probing rows.
        dense_layers: so many first layers are dense.
        causal: False for layers without a causal rule.
        per_kv_head: every key head has a budget and tokens of its own, by the attention of its
            query heads; else one set serves all heads of a layer.
        sparse_prompt: prompts attend among the chosen tokens; else densely, and the choice only
            says how the cache stores them (ZipCache, arXiv 2405.14256).
        kv: "quant" or "evict" for `AerogelCache`, or "full": the usual cache.
        bits_important: see `MixedPrecisionCacheLayer`.
        bits_other: the same.
        stream_gap: the same.

    Attributes:
        ratios: mean share of the tokens chosen in the last prompt, by layer.
        costs: (query, key) pairs of the last prompt over those of dense attention, by layer; the
            probing rows count too.

    Raises:
        ValueError: an option is out of range.

    Reference:
        He et al., arXiv 2410.08584.
    """

    slug = "zipvl"

    def __init__(
        self,
        tau: float = 0.975,
        probe_recent: float = 0.05,
        probe_random: float = 0.05,
        probe_max: int = 256,
        keep_last: int = 1,
        keep_first: int = 0,
        normalizer: Literal["probe", "full"] = "probe",
        seed: int = 0,
        dense_layers: int = 0,
        causal: bool = True,
        per_kv_head: bool = False,
        sparse_prompt: bool = True,
        kv: Literal["quant", "evict", "full"] = "quant",
        bits_important: int = 4,
        bits_other: int = 2,
        stream_gap: int = 100,
    ) -> None:
        super().__init__()
        self._options: dict[str, Any] = {
            name: value
            for name, value in locals().items()
            if name != "self" and not name.startswith("_")
        }
        _check(tau, probe_recent, probe_random, probe_max, keep_last, keep_first, normalizer)
        check_count("seed", seed, 0)
        check_count("dense_layers", dense_layers, 0)
        if kv != "full":
            from aerogel.attention.mixed_cache import check_cache_options

            check_cache_options(bits_important, bits_other, stream_gap, kv)
        self.tau, self.normalizer, self.seed, self.causal = tau, normalizer, seed, causal
        self.probe = (probe_recent, probe_random, probe_max, seed)
        self.keep_last, self.keep_first, self.dense_layers = keep_last, keep_first, dense_layers
        self.per_kv_head, self.sparse_prompt = per_kv_head, sparse_prompt
        self.kv: Literal["quant", "evict", "full"] = kv
        self.cache_options: dict[str, Any] = {
            "bits_important": bits_important, "bits_other": bits_other, "stream_gap": stream_gap,
        }  # fmt: skip
        self.ratios: dict[int, float] = {}
        self.costs: dict[int, float] = {}

    def options(self) -> dict[str, Any]:
        return dict(self._options)

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        return self.important(ctx) if self.sparse_prompt else DensePlan()

    def important(self, ctx: AttentionContext) -> Plan:
        """The important tokens of a prompt in one piece; of others all.

        Raises:
            ValueError: a window, another causal rule, or padding that is not on the left.
        """
        shape = ctx.shape
        if ctx.window is not None:
            raise ValueError(f"window={ctx.window}: expected a layer without a sliding window")
        if shape.causal != self.causal:
            raise ValueError(f"causal={self.causal}: the layer's attention is the other kind")
        if shape.k_len == 0:
            raise ValueError("prompt: expected at least one token, got 0")
        if ctx.layer_idx < self.dense_layers or shape.q_len != shape.k_len:
            return DensePlan()
        heads = shape.kv_heads if self.per_kv_head else 1
        first = _first_real(ctx).repeat_interleave(heads)
        lengths = shape.k_len - first
        rows = self._rows(first, shape.k_len)
        padding = ctx.key_padding
        padding = None if padding is None else padding.repeat_interleave(heads, 0)
        q, k = heads_as_batch(ctx.q, heads), heads_as_batch(ctx.k, heads)
        scores = probe_scores(q, k, rows, causal=self.causal, scale=ctx.scale, key_padding=padding)
        budget = torch.minimum(mass_budget(scores, self.tau), lengths)
        chosen = self.choose(scores, rows, budget, first)
        count = chosen.sum(1)
        self.ratios[ctx.layer_idx] = float((count / lengths).mean())
        seen = rows + 1 - first[:, None] if self.causal else lengths[:, None].expand_as(rows)
        pairs = self._pairs(count) + seen.masked_fill(rows < 0, 0).sum(1)
        self.costs[ctx.layer_idx] = float((pairs / self._pairs(lengths)).mean())
        if heads > 1:
            chosen = chosen.view(shape.batch, heads, -1)
        return TokenPlan.from_mask(chosen, "both")

    def choose(self, scores: Tensor, rows: Tensor, budget: Tensor, first: Tensor) -> Tensor:
        """The important tokens.

        Args:
            scores: (B, n) attention that each token takes from the probing rows.
            rows: (B, m) the probing rows, -1 = none.
            budget: (B,) how many to choose.
            first: (B,) first real token.

        Returns:
            (B, n) bool.
        """
        length = scores.shape[1]
        j = torch.arange(length, device=scores.device)
        if self.normalizer == "full":
            seen = (length - j).expand_as(scores)
        else:
            seen = (rows[:, :, None] >= (j if self.causal else 0 * j)).sum(1)
        ranked = scores / seen.clamp(min=1)
        forced = (j >= length - self.keep_last) | (j - first[:, None] < self.keep_first)
        ranked = ranked.masked_fill(forced, torch.inf).masked_fill(j < first[:, None], -1)
        forced = forced & (j >= first[:, None])
        count = torch.maximum(budget, forced.sum(1))
        order = ranked.flip(1).argsort(dim=1, descending=True, stable=True)  # ties: the later token
        return (order.argsort(1) < count[:, None]).flip(1)

    def _pairs(self, tokens: Tensor) -> Tensor:
        """Pairs of so many tokens among themselves."""
        return tokens * (tokens + 1) // 2 if self.causal else tokens**2

    def _rows(self, first: Tensor, length: int) -> Tensor:
        """(B, m) int64 probing rows of every prompt, -1 = none."""
        each = [int(f) + probe_rows(length - int(f), *self.probe) for f in first]
        rows = nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=-1)
        return rows.to(first.device)

    def cache_layer(self, layer_idx: int, kv_heads: int) -> Any:
        if self.kv == "full":
            return None
        from aerogel.attention.mixed_cache import MixedPrecisionCacheLayer

        return MixedPrecisionCacheLayer(
            self.important, tau=self.tau, kv=self.kv, layer_idx=layer_idx,
            per_kv_head=self.per_kv_head, sparse_prompt=self.sparse_prompt, **self.cache_options,
        )  # fmt: skip


class ZipVLHandle:
    """A model under ZipVL.

    Attributes:
        model: the model.
        selector: what chooses its tokens.
    """

    def __init__(self, model: nn.Module, selector: ZipVLSelector) -> None:
        self.model, self.selector = model, selector

    @property
    def ratios(self) -> list[float]:
        """Share of the tokens chosen in the last prompt, for each layer."""
        return [ratio for _, ratio in sorted(self.selector.ratios.items())]

    @property
    def costs(self) -> list[float]:
        """Pairs of the last prompt over dense attention's, probing included, for each layer."""
        return [cost for _, cost in sorted(self.selector.costs.items())]

    def cache(self) -> Any:
        """An empty cache for one prompt, as ``past_key_values`` of ``model.generate``."""
        from aerogel.attention.cache import AerogelCache

        return AerogelCache(self.model)

    def remove(self) -> None:
        """Gives the model its own attention back."""
        detach(self.model)


def apply_zipvl(model: nn.Module, tau: float = 0.975, **options: Any) -> ZipVLHandle:
    """Lets a transformers decoder read prompts by ZipVL.

    Args:
        model: a causal transformers model without sliding windows, or a vision-language model
            around one: its vision tower stays as it is.
        tau: share of the attention that the chosen tokens hold.
        options: others of `ZipVLSelector`.

    Raises:
        ValueError: the model's attention cannot be replaced, or an option is out of range.
    """
    selector = ZipVLSelector(tau, **options)
    attach(model, selector, strict=True)
    return ZipVLHandle(model, selector)


def _first_real(ctx: AttentionContext) -> Tensor:
    """(B,) int64 first real token of every prompt."""
    padding = ctx.key_padding
    if padding is None:
        return torch.zeros(ctx.shape.batch, dtype=torch.int64, device=ctx.k.device)
    if not bool(padding[:, -1].all()) or bool((padding[:, 1:] < padding[:, :-1]).any()):
        raise ValueError(
            "key_padding: expected left padding only, and a real token in every prompt"
        )
    return (~padding).sum(1)


def _check(
    tau: float,
    probe_recent: float,
    probe_random: float,
    probe_max: int,
    keep_last: int,
    keep_first: int,
    normalizer: str,
) -> None:
    check_number("tau", tau, "(0, 1]")
    check_number("probe_recent", probe_recent, "[0, 1]")
    check_number("probe_random", probe_random, "[0, 1]")
    if probe_recent == probe_random == 0:
        raise ValueError("probe_recent=0, probe_random=0: expected one above 0")
    check_count("probe_max", probe_max)
    check_count("keep_last", keep_last, 0)
    check_count("keep_first", keep_first, 0)
    check_choice("normalizer", normalizer, ("probe", "full"))
