"""Double Sparsity on two pretrained models: a quarter of the channels finds the keys that matter.

First, what is kept of the attention of a sentence encoder (all-MiniLM-L6-v2, heads of 32) when each
query reads 64 of 512 keys, chosen by labels of 8 or 16 channels: channels calibrated on eight
pieces of text by each of the three metrics, or drawn at random, on three other pieces; beside
the best 64 keys and the nearest 64.

Second, SmolLM2-135M-Instruct (30 Llama layers, 9 query and 3 key heads of 64) reads prompts of 1024
tokens of Python's documentation whose last 128 repeat an earlier passage. Layers 0 and 1 are
dense, all other rows read 64 keys each, chosen by 16 channels per query head. Calibration is on
Python's documentation too, but on windows that no prompt is made of. A seed draws a prompt and the
random channels.

Third, the small byte model of experiments/tiny_lm.py reads 48 held-out sequences of 256 bytes whose
last 64 repeat an earlier passage: layer 0 dense, all other rows read 16 keys each. Calibration is
on 16 windows of its training text.

The last part is time: one decoding step of 8 heads of 64, its selection included, against torch's
attention over the whole cache, one thread, interleaved; left out where the kernels are not built.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import minilm_attention
import tiny_lm
from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    ChannelOrder,
    DensePlan,
    DoubleSparsitySelector,
    attach,
    calibrate_channels,
    detach,
    select,
    stable_topk,
)
from aerogel.attention.channel_calibration import METRICS, ChannelStatistics
from aerogel.attention.label_cache import LabelCacheLayer
from aerogel.attention.prompt_patterns import AShapeSelector
from aerogel.data import recall
from aerogel.data.source_text import load_source_text
from aerogel.insight import PassageNats, passage_nats
from aerogel.kernels import native_available
from aerogel.report.evidence import Claim, Result, as_script, mean
from smollm2_topics import model_and_windows

SLUG = "double-sparsity"
SEEDS = (0, 1, 2, 3)

CALIBRATED, HELD_OUT, KEPT = 8, 3, 64
PROMPTS, LENGTH, REPEATED, TOKENS, PIECES = 1, 1024, 128, 64, 2
SINK = 4
BYTES_READ, BYTE_WINDOWS = 16, 16
TIMED, ROUNDS = ((4096, 128), (32_768, 512), (131_072, 2048)), 9


def run(seed: int) -> Result:
    """Share of attention kept, nats of prompts, seconds of a step."""
    started = time.perf_counter()
    metrics = _kept(seed) | _nats(seed) | _bytes(seed)
    if native_available():
        metrics |= _times()
    notes = (
        f"Kept: softmax weight on {KEPT} of 512 keys, %, mean over layers, heads and rows.",
        f"Nats a token, {PROMPTS} prompt a seed; plain text is all before the repeat.",
        "Bytes: nats a byte of the small model, on the repeat.",
        "Speed: torch's attention divided by labels, choice and sparse attention together.",
    )
    return Result(SLUG, seed, metrics, time.perf_counter() - started, notes)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    paper = "1/16 of tokens and channels with minimal change of accuracy"

    def claim(text: str, ours: str, baseline: float, threshold: float, unit: str) -> Claim:
        lower = unit == "nats"
        return Claim(text, mean(results, ours), baseline, threshold, paper, unit, not lower)

    exact, chance = mean(results, "kept, best keys"), mean(results, "kept, random d/4")
    near = mean(results, "kept, nearest keys")
    found = [
        claim("kept by qk, d/4: of the best", "kept, qk d/4", 0.75 * exact, 0, "%"),
        claim("kept by qk, d/4: above random channels", "kept, qk d/4", chance, 5, "%"),
        claim("kept by qk, d/4: above the nearest keys", "kept, qk d/4", near, 12, "%"),
        claim("kept by qk, d/2: of the best", "kept, qk d/2", 0.9 * exact, 0, "%"),
        claim("channels of two halves of the text agree", "overlap, qk d/4", 80.0, 0, "%"),
    ]
    for part, slack in (("repeat", -0.3), ("plain", -0.15)):
        dense = mean(results, f"{part}, dense")
        found.append(claim(f"SmolLM2, {part}: qk over dense", f"{part}, qk", dense, slack, "nats"))
    for other in ("random channels", "sinks and recent"):
        worse = mean(results, f"repeat, {other}")
        dense = mean(results, "repeat, dense")
        text = f"SmolLM2, repeat: {other} over dense"
        found.append(Claim(text, worse, dense, 1.5, paper, "nats"))
    return found + _byte_claims(results, paper)


def _byte_claims(results: Sequence[Result], paper: str) -> list[Claim]:
    """On what the repeat costs the small model more than dense attention."""

    def loss(name: str) -> float:
        return mean(results, f"bytes, {name}") - mean(results, "bytes, dense")

    quarter = loss("qk d/4")
    return [
        Claim(f"bytes: loss by qk, d/4, {text}", quarter, most, 0, paper, "nats", False)
        for text, most in (
            ("to 0.65 of random channels'", 0.65 * loss("random channels")),
            ("to 0.3 of sinks and recent keys'", 0.3 * loss("sinks and recent")),
        )
    ] + [Claim("bytes: loss by qk, d/2", loss("qk d/2"), 0.1, 0, paper, "nats", False)]


def _selector(order: ChannelOrder, factor: int, **options: Any) -> DoubleSparsitySelector:
    return DoubleSparsitySelector(
        order, **{"heavy_tokens": TOKENS, "group_factor": factor, "sparse_prefill": True, **options}
    )


def _random_order(layers: int, heads: int, dim: int, seed: int) -> ChannelOrder:
    draw = torch.Generator().manual_seed(seed)
    return ChannelOrder(
        {i: torch.rand(heads, dim, generator=draw).argsort(-1) for i in range(layers)}
    )


def _kept(seed: int) -> dict[str, float]:
    sizes = (minilm_attention.LAYERS, minilm_attention.HEADS, minilm_attention.HEAD_DIM)
    return _kept_anyway() | _kept_by({"random": _random_order(*sizes, seed)})


@lru_cache(maxsize=1)
@torch.no_grad()
def _kept_anyway() -> dict[str, float]:
    """What no seed changes."""
    learnt = minilm_attention.pieces(CALIBRATED + HELD_OUT)[:CALIBRATED]
    metrics = _kept_by({metric: _order(metric, learnt) for metric in METRICS})
    halves = [learnt[: CALIBRATED // 2], learnt[CALIBRATED // 2 :]]
    first, second = (_order("qk", part).layers for part in halves)
    quarter = minilm_attention.HEAD_DIM // 4
    metrics["overlap, qk d/4"] = 100 * _overlap(first, second, quarter)
    return metrics


@torch.no_grad()
def _kept_by(orders: dict[str, ChannelOrder]) -> dict[str, float]:
    options = {"heavy_tokens": KEPT, "dense_layers": (), "always_keep_last": False}
    chosen = {
        f"{name} d/{factor}": _selector(order, factor, **options)
        for name, order in orders.items()
        for factor in (4, 2)
    }
    kept: dict[str, list[float]] = {}
    j = torch.arange(minilm_attention.LENGTH)
    near = stable_topk(-(j[:, None] - j).abs().float(), KEPT)[None, None]
    for piece in minilm_attention.pieces(CALIBRATED + HELD_OUT)[CALIBRATED:]:
        for layer, view in enumerate(piece):
            weights, ctx = view.weights(), view.context(layer)
            best = weights.topk(KEPT, -1).values.sum(-1)
            kept.setdefault("best keys", []).append(float(best.mean()))
            nearest = weights.gather(-1, near.expand(*weights.shape[:2], -1, -1)).sum(-1)
            kept.setdefault("nearest keys", []).append(float(nearest.mean()))
            for name, selector in chosen.items():
                mask = select(selector, ctx).to_dense_mask(ctx.shape)
                kept.setdefault(name, []).append(float((weights * mask).sum(-1).mean()))
    return {f"kept, {name}": 100 * sum(x) / len(x) for name, x in kept.items()}


def _order(metric: Any, pieces: list[list[minilm_attention.Piece]]) -> ChannelOrder:
    statistics = ChannelStatistics(metric)
    for piece in pieces:
        for layer, view in enumerate(piece):
            statistics.plan_prefill(view.context(layer))
    return statistics.order()


def _overlap(a: dict[int, Tensor], b: dict[int, Tensor], size: int) -> float:
    shared = [
        float((a[i][:, :size, None] == b[i][:, None, :size]).any(-1).float().mean()) for i in a
    ]
    return sum(shared) / len(shared)


def _nats(seed: int) -> dict[str, float]:
    model, windows = model_and_windows(LENGTH)
    order = _calibrated()
    heads, dim = order.layers[0].shape
    orders = {"qk": order, "random channels": _random_order(len(order.layers), heads, dim, seed)}
    draw = torch.Generator().manual_seed(seed)
    numbers = PIECES + torch.randperm(len(windows) - PIECES, generator=draw)[:PROMPTS]
    prompts = recall.repeat_passage(windows[numbers], (REPEATED, REPEATED), draw)
    ways: dict[str, Any] = {"dense": None}
    ways |= {name: _selector(order, 4) for name, order in orders.items()}
    ways["sinks and recent"] = _Recent(SINK, TOKENS - SINK)
    metrics = {}
    for name, selector in ways.items():
        nats = _read(model, selector, prompts)
        metrics[f"plain, {name}"], metrics[f"repeat, {name}"] = nats
    return metrics


def _read(model: nn.Module, selector: Any, prompts: tuple[Tensor, Tensor]) -> PassageNats:
    if selector is not None:
        attach(model, selector)
    try:
        return passage_nats(model, *prompts)
    finally:
        detach(model)


class _Recent(AShapeSelector):
    """First and nearest keys, except in the first layers."""

    slug = "recent"
    dense = 2

    def plan_prefill(self, ctx: AttentionContext) -> Any:
        return DensePlan() if ctx.layer_idx < self.dense else super().plan_prefill(ctx)


def _bytes(seed: int) -> dict[str, float]:
    model, order = _byte_model()
    heads, dim = order.layers[0].shape
    drawn = _random_order(len(order.layers), heads, dim, seed)
    chosen = _selector(drawn, 4, heavy_tokens=BYTES_READ, dense_layers=(0,))
    nats = _read(model, chosen, tiny_lm.held_out())
    return _bytes_anyway() | {"bytes, random channels": nats.repeat}


@lru_cache(maxsize=1)
def _bytes_anyway() -> dict[str, float]:
    """What no seed changes."""
    model, order = _byte_model()
    options = {"heavy_tokens": BYTES_READ, "dense_layers": (0,)}
    ways: dict[str, Any] = {
        f"qk d/{factor}": _selector(order, factor, **options) for factor in (1, 2, 4)
    }
    ways |= {"dense": None, "sinks and recent": _Recent(SINK, BYTES_READ - SINK)}
    ways["sinks and recent"].dense = 1
    prompts = tiny_lm.held_out()
    return {f"bytes, {name}": _read(model, way, prompts).repeat for name, way in ways.items()}


@lru_cache(maxsize=1)
def _byte_model() -> tuple[nn.Module, ChannelOrder]:
    model, draw = tiny_lm.load(), torch.Generator().manual_seed(0)
    text = load_source_text().train
    windows = recall.draw_windows(text, BYTE_WINDOWS, tiny_lm.LENGTH, draw)
    return model, calibrate_channels(model, windows.split(4), "qk", share_group=False)


@lru_cache(maxsize=1)
def _calibrated() -> ChannelOrder:
    model, windows = model_and_windows(LENGTH)
    return calibrate_channels(model, windows[:PIECES].split(1), "qk", share_group=False)


@lru_cache(maxsize=1)
@torch.no_grad()
def _times() -> dict[str, float]:
    metrics = {}
    for length, tokens in TIMED:
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 8, n, 64, generator=draw) for n in (1, length, length))
        order = _random_order(1, 8, 64, 0)
        shape = AttentionShape(1, 8, 8, 1, length, causal=True)
        for bits, run_of in ((16, 1), (16, 16), (4, 1)):
            selector = DoubleSparsitySelector(
                order, tokens, label_bits=bits, run=run_of, dense_layers=(), dense_when_short=False
            )
            layer = LabelCacheLayer(selector)
            layer.update(k, v)
            layer.append_labels(k, 0, 8)
            ctx = AttentionContext(q, layer.keys, layer.values, shape, 0.125, cache_layer=layer)
            dense, sparse = [], []
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                scaled_dot_product_attention(q, k, v)
                middle = time.perf_counter()
                selector.attention(ctx)
                dense.append(middle - begin)
                sparse.append(time.perf_counter() - middle)
            name = f"speed-up at {length}, labels of {bits} bits, runs of {run_of}"
            metrics[name] = min(dense) / min(sparse)
    return metrics


if __name__ == "__main__":
    as_script(run, claims, SEEDS, threads=1)
