"""SeerAttention: distilled gates choose blocks better than pooled means or fixed places.

First, a sentence encoder (all-MiniLM-L6-v2, 12 heads of 32, all tokens read all others) on pieces
of 512 tokens of Python's documentation, in blocks of 32. Gates of width 32 learn the largest weight
of each block on 30 pieces (300 steps of 4); on 6 others, every row of blocks keeps 4 of 16: by
the gate, by the product of mean queries and keys, the first and the nearest ones, or the target's
own best.

Second, the causal path with rotary embedding: gates of four layers of SmolLM2-135M-Instruct learn
on windows of 1024 tokens, blocks of 32; on another window every row keeps so many blocks that a
quarter of the area stays. The whole model's loss is scored with those four layers sparse. The same
on the small byte model (experiments/tiny_lm.py): all three layers, 256 bytes, blocks of 16.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import minilm_attention
import tiny_lm
from aerogel.attention import (
    AttentionContext,
    DensePlan,
    Plan,
    SeerAttentionSelector,
    attach,
    detach,
    stable_topk,
)
from aerogel.attention.block_target import BlockRule, block_target
from aerogel.attention.seer_gate import SeerGate, pool_blocks
from aerogel.attention.seerattention import Lesson
from aerogel.data import recall
from aerogel.data.source_text import load_source_text
from aerogel.finetune import distill_gates, fit_gates, make_gates
from aerogel.insight import token_nats
from aerogel.report.evidence import Claim, Result, as_script, mean
from smollm2_topics import model_and_windows

SLUG = "seerattention"
SEEDS = (0, 1, 2)

BLOCK, GATE_DIM, KEPT = 32, 32, (2, 4, 6)
PIECES, HELD_OUT, STEPS, BATCH, LR = 30, 6, 300, 4, 5e-3
LM_LAYERS, LM_LENGTH, LM_WINDOWS, LM_STEPS, RATIO = (4, 11, 18, 25), 1024, 4, 200, 0.25
BYTES, BYTE_BLOCK, BYTE_WINDOWS, BYTE_HELD_OUT, BYTE_BATCH = 256, 16, 60, 12, 2


def run(seed: int) -> Result:
    """Train gates; measure what their blocks keep."""
    started = time.perf_counter()
    metrics = _encoder(seed) | _smollm2() | _byte_model()
    notes = (
        "Kept: softmax weight in the chosen blocks, %, mean over layers, heads and rows.",
        "Loss of a gate: divergence from its target, nats a row of blocks.",
        "SmolLM2 and the byte model are measured once, with the first seed's gates. In the byte "
        "model's small blocks the target itself, largest weights, keeps less than mean pooling.",
    )
    return Result(SLUG, seed, metrics, time.perf_counter() - started, notes)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    paper = "better than MInference and MoA at equal sparsity"

    def kept(name: str) -> float:
        return mean(results, f"kept in 4 of 16, {name}")

    gate, start = kept("gate"), mean(results, "loss before")
    return [
        Claim("kept: gate over mean pooling", gate, kept("mean pooling"), 1, paper, "%"),
        Claim("kept: gate over first and nearest", gate, kept("first and nearest"), 3, paper, "%"),
        Claim("kept: gate of the best blocks", gate, 0.97 * kept("target"), 0, paper, "%"),
        Claim(
            "the gates' loss falls to a fifth",
            mean(results, "loss after"),
            0.2 * start,
            0,
            paper,
            "nats",
            higher_is_better=False,
        ),
        Claim(
            "SmolLM2, kept: gate over mean pooling",
            mean(results, "SmolLM2: kept, gate"),
            mean(results, "SmolLM2: kept, mean pooling"),
            0,
            paper,
            "%",
        ),
        Claim(
            "byte model, kept: gate over mean pooling",
            mean(results, "byte model: kept, gate"),
            mean(results, "byte model: kept, mean pooling"),
            0,
            paper,
            "%",
        ),
        Claim(
            "byte model, kept: gate of the best blocks",
            mean(results, "byte model: kept, gate"),
            0.97 * mean(results, "byte model: kept, target"),
            0,
            paper,
            "%",
        ),
    ]


def _encoder(seed: int) -> dict[str, float]:
    pieces = minilm_attention.pieces(PIECES + HELD_OUT)
    layers, heads, dim = (
        minilm_attention.LAYERS,
        minilm_attention.HEADS,
        minilm_attention.HEAD_DIM,
    )
    torch.manual_seed(seed)
    gates = {
        i: SeerGate(heads, heads, dim, gate_dim=GATE_DIM, block_size=BLOCK, rope_theta=None)
        for i in range(layers)
    }
    selector = SeerAttentionSelector(gates)
    lessons = _lessons()
    before = _loss(selector, lessons[PIECES:])
    fit_gates(
        selector, lessons.__getitem__, PIECES, steps=STEPS, batch_size=BATCH, lr=LR, seed=seed
    )
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        for piece, known in zip(pieces[PIECES:], lessons[PIECES:], strict=True):
            for layer, view in enumerate(piece):
                ctx = view.context(layer)
                blocks = _block_weights(view.weights())
                scores = {
                    "gate": selector.scores(ctx),
                    "mean pooling": _mean_scores(ctx),
                    "first and nearest": _fixed_scores(blocks),
                    "target": _whole_target(known[layer], blocks),
                }
                for name, score in scores.items():
                    for k in KEPT:
                        share = blocks.gather(-1, stable_topk(score, k)).sum(-1).mean()
                        found.setdefault(f"kept in {k} of 16, {name}", []).append(float(share))
    metrics = {name: 100 * sum(x) / len(x) for name, x in found.items()}
    return metrics | {"loss before": before, "loss after": _loss(selector, lessons[PIECES:])}


@lru_cache(maxsize=1)
def _lessons() -> list[dict[int, Lesson]]:
    """Per piece and layer; the same for every seed, since pooling learns nothing."""
    heads, dim = minilm_attention.HEADS, minilm_attention.HEAD_DIM
    gate = SeerGate(heads, heads, dim, gate_dim=GATE_DIM, block_size=BLOCK, rope_theta=None)
    selector = SeerAttentionSelector(dict.fromkeys(range(minilm_attention.LAYERS), gate))
    found = []
    for piece in minilm_attention.pieces(PIECES + HELD_OUT):
        parts = {layer: selector.lesson(view.context(layer)) for layer, view in enumerate(piece)}
        found.append({layer: lesson for layer, lesson in parts.items() if lesson is not None})
    return found


@torch.no_grad()
def _loss(selector: SeerAttentionSelector, lessons: list[dict[int, Lesson]]) -> float:
    blocks = minilm_attention.LENGTH // BLOCK
    losses = [float(selector.lesson_loss(*item)) for piece in lessons for item in piece.items()]
    return blocks * sum(losses) / len(losses)


def _block_weights(weights: Tensor) -> Tensor:
    """(1, H, L, L) to the weight that a mean row of each block of rows gives each block."""
    return weights.unflatten(-1, (-1, BLOCK)).sum(-1).unflatten(2, (-1, BLOCK)).mean(3)


def _mean_scores(ctx: AttentionContext, block: int = BLOCK) -> Tensor:
    q, k = (pool_blocks(t, block, ("avg",)) for t in (ctx.q, ctx.k))
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2)


def _fixed_scores(like: Tensor) -> Tensor:
    n = torch.arange(like.shape[-1])
    scores = -(n[:, None] - n).abs().float()
    scores[:, 0] = 1.0
    return scores.expand_as(like)


def _whole_target(lesson: Lesson, blocks: Tensor) -> Tensor:
    """The lesson's rows, and for the first quarter, which it leaves out, the weights themselves."""
    return torch.cat([blocks[:, :, : lesson.first], lesson.target], 2)


@lru_cache(maxsize=1)
def _smollm2() -> dict[str, float]:
    model, windows = model_and_windows(LM_LENGTH)
    held_out = windows[LM_WINDOWS : LM_WINDOWS + 1]
    options = {"block_size": BLOCK, "gate_dim": 64, "layers": LM_LAYERS}
    return _causal("SmolLM2", model, windows[:LM_WINDOWS], held_out, options, 1)


@lru_cache(maxsize=1)
def _byte_model() -> dict[str, float]:
    draw = torch.Generator().manual_seed(0)
    text = load_source_text()
    windows = recall.draw_windows(text.train, BYTE_WINDOWS, BYTES, draw)
    held_out = recall.draw_windows(text.held_out, BYTE_HELD_OUT, BYTES, draw)
    options = {"block_size": BYTE_BLOCK, "gate_dim": 32}
    return _causal("byte model", tiny_lm.load(), windows, held_out, options, BYTE_BATCH)


def _causal(
    label: str,
    model: nn.Module,
    windows: Tensor,
    held_out: Tensor,
    options: dict[str, Any],
    batch: int,
) -> dict[str, float]:
    """Trains gates of a language model; measures what they, mean pooling and their target keep."""
    selector = make_gates(model, method="ratio", ratio=RATIO, last_block_dense=False, **options)
    losses = distill_gates(model, selector, windows, steps=LM_STEPS, batch_size=batch, lr=LR)
    metrics = {f"{label}: dense, nats": float(token_nats(model, held_out).mean())}
    for name in ("gate", "mean pooling", "target"):
        counted = _Counted(selector, name)
        attach(model, counted)
        try:
            metrics[f"{label}: {name}, nats"] = float(token_nats(model, held_out).mean())
        finally:
            detach(model)
        metrics[f"{label}: kept, {name}"] = 100 * sum(counted.kept) / len(counted.kept)
        metrics[f"{label}: area, {name}"] = 100 * sum(counted.area) / len(counted.area)
    rows = windows.shape[1] // selector.block / len(selector.gates)
    last = losses[-max(1, len(windows) // batch) :]
    metrics[f"{label}: loss before"] = losses[0] * rows
    metrics[f"{label}: loss after"] = sum(last) * rows / len(last)
    return metrics


class _Counted(SeerAttentionSelector):
    """The gates, or mean pooling or their target instead; notes what is kept of each map."""

    def __init__(self, other: SeerAttentionSelector, by: str) -> None:
        super().__init__({int(n): gate for n, gate in other.gates.items()})  # type: ignore[misc]
        self.rule, self.by = BlockRule("ratio", 0.0, RATIO, last_block_dense=False), by
        self.kept: list[float] = []
        self.area: list[float] = []

    def scores(self, ctx: AttentionContext) -> Tensor:
        scores = super().scores(ctx)
        if self.by == "gate":
            return scores
        if self.by == "target":
            return torch.log(block_target(ctx, self.block))
        return _mean_scores(ctx, self.block).masked_fill(scores == -torch.inf, -torch.inf)

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        plan = super().plan_prefill(ctx)
        if not isinstance(plan, DensePlan):
            mask = plan.to_dense_mask(ctx.shape)
            k = ctx.k.repeat_interleave(ctx.shape.q_heads // ctx.shape.kv_heads, 1)
            logits = ctx.q @ k.transpose(-1, -2) * ctx.scale
            weights = torch.softmax(logits.masked_fill(~ctx.shape.causal_mask(), -torch.inf), -1)
            self.kept.append(float((weights * mask).sum(-1).mean()))
            self.area.append(plan.density(ctx.shape))
        return plan


if __name__ == "__main__":
    as_script(run, claims, SEEDS, threads=1)
