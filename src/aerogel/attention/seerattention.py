"""SeerAttention: a small gate per layer foretells which blocks of the attention map matter.

Paper: Gao, Zeng, Du, Cao, Zhou, Qi, Lai, So, Cao, Yang and Yang, "SeerAttention: Learning Intrinsic
Sparse Attention in Your LLMs", 2024, arXiv 2410.13276. Mode "decode" is its successor for
generation, SeerAttention-R, arXiv 2506.08889.

The idea: queries and keys, before rotary embedding, are pooled in blocks of 64 tokens; a gate of a
few linear maps scores every pair of blocks. The model stays as it is: the gate alone is trained,
with the largest weights of the model's own attention map per block as its target. A threshold or a
share of the area turns scores into blocks, over which softmax is exact.

When to use it: prompts of many thousand tokens, or (mode "decode") long generations, on a model for
which some minutes to hours of distillation are worth it. Costs and buys: a gate of a few MB and
1/4096 of the map's work, then a fraction of its blocks. `aerogel.finetune.distill_gates` trains.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from aerogel.arguments import check_choice, check_count
from aerogel.attention.block_plan import BlockPlan
from aerogel.attention.block_target import (
    BlockRule,
    block_target,
    blocks_of,
    divergence,
    row_target,
)
from aerogel.attention.plan import DensePlan, Plan
from aerogel.attention.seer_gate import SeerDecodeGate, SeerGate, pool_blocks, real_blocks
from aerogel.attention.selector import AttentionContext, Selector, add_selector
from aerogel.attention.topk import stable_topk


class Lesson(NamedTuple):
    """What a gate learns from: inputs and target of one layer and batch.

    Attributes:
        q: (B, Hq, n, d * poolings) pooled queries; mode "decode": (B, Hq, rows, d) queries.
        k: (B, Hkv, n, d * poolings) pooled keys.
        target: rows of the normalised block map, from `first` on.
        real: (B, L) bool, True at real tokens, or None.
        first: first query block, or row.
        causal: whether later blocks are out of reach.
    """

    q: Tensor
    k: Tensor
    target: Tensor
    real: Tensor | None
    first: int
    causal: bool


Gate = SeerGate | SeerDecodeGate
_COMMON = ("num_q_heads", "num_kv_heads", "head_dim", "gate_dim", "block_size", "k_pool")


@add_selector
class SeerAttentionSelector(Selector):
    """Blocks by gates that were distilled from the model.

    Args:
        gates: a gate per layer number, all of one kind; layers without one are dense. Or what
            `options` keeps of them, to be filled from a file.
        method: "threshold" or "ratio" as for `BlockRule`, or "token_budget" in mode "decode".
        threshold: least probability of a block, in [0, 1).
        ratio: kept share of the causal area, in (0, 1].
        budget: tokens that a decoding step reads, a multiple of the block.
        last_block_dense: a prompt's last two rows of blocks keep everything; the question is there.
        force_diagonal: every row of blocks keeps its own; the authors' code does not see to it.
        mode: "prefill" makes prompts sparse and steps dense, "decode" the reverse.
        start_layer: layers below are dense.

    Raises:
        ValueError: an option is out of range, or gates are not of the mode's kind.

    Reference:
        Gao et al., arXiv 2410.13276 and arXiv 2506.08889.
    """

    slug = "seerattention"
    needs = frozenset({"pre_rope", "calibration"})

    def __init__(
        self,
        gates: Mapping[int, Gate] | dict[str, Any],
        method: Literal["threshold", "ratio", "token_budget"] = "threshold",
        threshold: float = 5e-4,
        ratio: float | None = None,
        budget: int | None = None,
        last_block_dense: bool = True,
        force_diagonal: bool = True,
        mode: Literal["prefill", "decode"] = "prefill",
        start_layer: int = 0,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("prefill", "decode"))
        check_choice("method", method, ("threshold", "ratio", "token_budget"))
        check_count("start_layer", start_layer, 0)
        if budget is not None:
            check_count("budget", budget)
        wanted: type[Gate] = SeerGate if mode == "prefill" else SeerDecodeGate
        made = _made(gates, wanted) if "layers" in gates else dict(gates)
        if not made or any(not isinstance(gate, wanted) for gate in made.values()):
            raise ValueError(f"gates: expected one {wanted.__name__} or more for mode={mode!r}")
        if len({str(_description(gate)) for gate in made.values()}) != 1:
            raise ValueError("gates: expected the same sizes in all layers")
        self.gates = nn.ModuleDict({str(layer): gate for layer, gate in made.items()})
        self.block: int = next(iter(made.values())).block_size
        if (method == "token_budget") != (budget is not None) or (budget and mode == "prefill"):
            raise ValueError(
                f"budget={budget}: expected with method='token_budget' in mode 'decode' only"
            )
        if budget is not None and (budget < self.block or budget % self.block):
            raise ValueError(f"budget={budget}: expected a multiple of the block, {self.block}")
        if mode == "decode":
            if method == "ratio":
                raise ValueError("method='ratio': expected 'threshold' or 'token_budget'")
            self.needs = self.needs | {"cache"}  # type: ignore[misc]
        rule = "ratio" if method == "ratio" else "threshold"
        self.rule = BlockRule(rule, threshold, ratio, last_block_dense, force_diagonal)  # type: ignore[arg-type]
        self.method, self.budget, self.mode, self.start_layer = method, budget, mode, start_layer
        self._noted = False

    def options(self) -> dict[str, Any]:
        layers = [int(layer) for layer in self.gates]
        return {
            "gates": {"layers": layers, **_description(self._gate(layers[0]))},
            "method": self.method,
            "threshold": self.rule.threshold,
            "ratio": self.rule.ratio,
            "budget": self.budget,
            "last_block_dense": self.rule.last_block_dense,
            "force_diagonal": self.rule.force_diagonal,
            "mode": self.mode,
            "start_layer": self.start_layer,
        }

    def cache_layer(self, layer_idx: int, kv_heads: int) -> Any:
        if self.mode != "decode" or self._absent(layer_idx):
            return None
        from aerogel.attention.block_cache import BlockCacheLayer

        return BlockCacheLayer(self.block)

    def _absent(self, layer: int) -> bool:
        return layer < self.start_layer or str(layer) not in self.gates

    def _gate(self, layer: int) -> Any:
        return self.gates[str(layer)]

    def scores(self, ctx: AttentionContext) -> Tensor:
        """Scores (B, Hq, n, n) of the blocks of a whole prompt, mode "prefill"."""
        q, k = self._before_rope(ctx)
        scores: Tensor = self._gate(ctx.layer_idx)(q, k, ctx.key_padding, causal=ctx.shape.causal)
        return scores

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        shape = ctx.shape
        if self.mode == "decode" or self._absent(ctx.layer_idx) or shape.q_len == 1:
            return DensePlan()
        if shape.q_len <= self.block:
            if not self._noted:
                self._noted = True
                warnings.warn(
                    f"{shape.q_len} tokens are no more than a block of {self.block}: dense",
                    stacklevel=2,
                )
            return DensePlan()
        if shape.q_offset:  # a later chunk of a prompt: earlier keys are no longer at hand
            return DensePlan()
        return self.rule.plan(self.scores(ctx), blocks_of(ctx, self.block), self.block)

    def on_append(self, ctx: AttentionContext) -> None:
        if self.mode != "decode" or self._absent(ctx.layer_idx):
            return
        if hasattr(ctx.cache_layer, "append_keys"):
            _, k = self._before_rope(ctx)
            ctx.cache_layer.append_keys(self._gate(ctx.layer_idx), k, ctx.key_padding)

    def plan_decode(self, ctx: AttentionContext) -> Plan:
        if self.mode != "decode" or self._absent(ctx.layer_idx):
            return DensePlan()
        gate, shape = self._gate(ctx.layer_idx), ctx.shape
        q, k = self._before_rope(ctx)
        if hasattr(ctx.cache_layer, "append_keys"):
            keys = ctx.cache_layer.compressed
        elif k.shape[2] == shape.k_len:
            keys = gate.compress(k[:, :, : shape.k_len // self.block * self.block])
        else:
            raise ValueError(
                f"past_key_values: a {type(ctx.cache_layer).__name__} keeps no compressed keys; "
                "pass past_key_values=aerogel.attention.cache.AerogelCache(model)"
            )
        own = shape.positions(q.device)[:, None] // self.block  # (Lq, 1)
        number = torch.arange(-(-shape.k_len // self.block), device=q.device)
        scores = q.new_full((*q.shape[:1], shape.kv_heads, shape.q_len, number.numel()), -torch.inf)
        if keys is not None and keys.shape[2]:
            scores = scores.float()
            scores[..., : keys.shape[2]] = gate.score(gate.queries(q, shape.q_offset), keys)
        scores = scores.masked_fill(number >= own, -torch.inf)
        if ctx.key_padding is not None:
            real = real_blocks(ctx.key_padding, self.block)
            scores = scores.masked_fill(~real[:, None, None], -torch.inf)
        if self.method == "token_budget":
            assert self.budget is not None
            best = stable_topk(scores, min(self.budget // self.block - 1, number.numel()))
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
            kept &= scores > -torch.inf
        else:
            kept = torch.softmax(scores, -1).nan_to_num() > self.rule.threshold
            kept |= (scores > -torch.inf) & (self.rule.threshold == 0)
        return BlockPlan.from_mask(kept | (number == own), 1, self.block)

    def loss(self, ctx: AttentionContext) -> Tensor | None:
        """Divergence of a layer's gate from its target on a whole prompt; None without a gate."""
        lesson = self.lesson(ctx)
        return None if lesson is None else self.lesson_loss(ctx.layer_idx, lesson)

    def lesson(self, ctx: AttentionContext) -> Lesson | None:
        """What a layer's gate learns from a whole prompt; None without a gate.

        Query blocks before a quarter of the prompt (rows before its half in mode "decode") are left
        out: what they can attend to is hardly a choice.
        """
        if self._absent(ctx.layer_idx):
            return None
        gate = self._gate(ctx.layer_idx)
        q, k = self._before_rope(ctx)
        if self.mode == "prefill":
            first = -(-ctx.shape.q_len // self.block) // 4
            target = block_target(ctx, self.block)[:, :, first:]
            queries, keys = gate.pool(q, k, ctx.key_padding)
            return Lesson(queries, keys, target, ctx.key_padding, first, ctx.shape.causal)
        first = ctx.shape.q_len // 2
        pooled = pool_blocks(k, self.block, gate.k_pool, ctx.key_padding)
        target = row_target(ctx, self.block, first)
        return Lesson(q[:, :, first:], pooled, target, ctx.key_padding, first, True)

    def lesson_loss(self, layer: int, lesson: Lesson) -> Tensor:
        """Divergence of a layer's gate from a lesson's target."""
        gate, first = self._gate(layer), lesson.first
        if self.mode == "prefill":
            scores = gate.score(lesson.q, lesson.k, real=lesson.real, causal=lesson.causal)
            return divergence(scores[:, :, first:], lesson.target)
        scores = gate.score(gate.queries(lesson.q, first), gate.finish(lesson.k))
        row = torch.arange(first, first + lesson.q.shape[2], device=scores.device)
        late = torch.arange(scores.shape[-1], device=scores.device) > row[:, None] // self.block
        return divergence(scores.masked_fill(late, -torch.inf), lesson.target)

    def _before_rope(self, ctx: AttentionContext) -> tuple[Tensor, Tensor]:
        if ctx.q_pre is None or ctx.k_pre is None:
            raise ValueError(
                "q_pre, k_pre: expected queries and keys before rotary embedding; use "
                "aerogel.attention.attach, which reads them"
            )
        gate = self._gate(ctx.layer_idx)
        gate.check_heads(ctx.q_pre.shape[1], ctx.k_pre.shape[1], ctx.q_pre.shape[-1])
        return ctx.q_pre, ctx.k_pre


def _description(gate: Any) -> dict[str, Any]:
    """What `_made` needs to make such a gate anew."""
    facts = {name: getattr(gate, name) for name in _COMMON}
    facts["k_pool"] = list(gate.k_pool)
    facts["rope_theta"] = 10_000.0 if gate.has_rope else None  # the file has the frequencies
    if isinstance(gate, SeerGate):
        return {
            **facts,
            "q_pool": list(gate.q_pool),
            "force_double": gate.q_weight is not None,
        }
    norm = isinstance(gate.q_norm, nn.RMSNorm)
    return {**facts, "grouping": gate.grouping, "norm": norm}


def _made(description: Any, kind: type[Gate]) -> dict[int, Gate]:
    options = {name: value for name, value in description.items() if name != "layers"}
    try:
        return {int(layer): kind(**options) for layer in description["layers"]}
    except TypeError as error:
        raise ValueError(f"gates: not a description of a {kind.__name__} ({error})") from error
