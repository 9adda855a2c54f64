"""MInference on a pretrained language model: a repeated passage is found through few keys.

SmolLM2-135M-Instruct (30 Llama layers, 9 query and 3 key heads; stored in 4 bits, here
dequantised) reads prompts of 1024 tokens of Python's documentation (`pydoc_data.topics`) whose last
128 tokens repeat an earlier passage. A model that still sees that passage predicts the repeat; one
that does not, cannot. All layers are sparse, with 64 columns and 128 diagonals per head, kept
per token (tiles of one row), so that the kept pairs are those lines and nothing beside them. The
same sizes with the lines of another prompt, and an A-shape of 16 first tokens and a window of 176,
show whether choosing anew for each prompt matters. A seed draws two prompts.

The second part is a small byte model (experiments/tiny_lm.py, 3 layers of 4 heads) on held-out text
of 256 bytes whose last 64 repeat an earlier passage: 16 columns and 32 diagonals per token, the
lines of the next prompt in the batch, an A-shape of as many pairs, and pooled blocks (4 of 16
bytes). And the search: the pattern of least output error for every head on one training text,
against each pattern for all heads alike, by the summed relative errors on four held-out texts.

The third part is time: one prompt of 4 heads of 64 at 4,096 to 16,384 tokens, random tensors,
vertical-slash with 256 columns and runs of diagonals (banded in tiles of 64 rows), against torch's
causal attention, one thread, interleaved; it is left out where the kernels are not built.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import tiny_lm
from aerogel.attention import AttentionContext, AttentionShape, Plan, SpanPlan, attach, attend
from aerogel.attention import detach as detach_model
from aerogel.attention.pattern_file import HeadPattern
from aerogel.attention.pattern_search import search_patterns
from aerogel.attention.prompt_patterns import (
    AShapeSelector,
    PooledBlockSelector,
    VerticalSlashSelector,
)
from aerogel.attention.vertical_slash import vertical_slash_plan
from aerogel.data import recall
from aerogel.data.source_text import load_source_text
from aerogel.insight import passage_nats
from aerogel.kernels import native_available
from aerogel.report.evidence import Claim, Result, as_script, mean
from smollm2_topics import model_and_windows

SLUG = "minference"
SEEDS = (0, 1, 2)

PROMPTS, LENGTH, REPEATED = 2, 1024, 128
LINES: dict[str, Any] = {
    "vertical": 64,
    "slash": 128,
    "last_q": 64,
    "force_first": 8,
    "force_local": 32,
    "block": 1,
}
A_SHAPE = (16, 176)

BYTES, BYTE_PROMPTS, BYTE_REPEAT = 256, 24, 64
BYTE_LINES: dict[str, Any] = {
    "vertical": 16,
    "slash": 32,
    "last_q": 16,
    "force_first": 4,
    "force_local": 16,
    "block": 1,
}
SEARCH: dict[str, Any] = {"last_q": 16, "force_first": 4, "force_local": 16, "block": 16}
PATTERNS = (
    HeadPattern("stream_llm", 4, 52),
    HeadPattern("vertical_and_slash", 48, 8),
    HeadPattern("vertical_and_slash", 16, 16),
    HeadPattern("block_sparse", 4, 0),
)
JUDGED_ON = 4  # held-out texts

TIMED, HEADS, HEAD_DIM, COLUMNS, RUNS, RUN, ROUNDS = (4096, 8192, 16384), 4, 64, 256, 6, 64, 3


def run(seed: int) -> Result:
    """Score the repeated passage under every choice of keys; time prompts."""
    started = time.perf_counter()
    metrics = _quality(seed) | _bytes(seed) | _searched(seed)
    if native_available():
        metrics.update(_times())
    notes = (
        f"Nats per token, means over {PROMPTS} prompts of {LENGTH} tokens a seed. Plain: tokens "
        "256 to 896. Kept: share of the causal pairs that the first layer reads.",
        f"Bytes: nats a byte of the small model, means over {BYTE_PROMPTS} prompts a seed. Errors: "
        f"summed over 12 heads and {JUDGED_ON} texts.",
        "Speed: torch's causal attention divided by estimate, index and sparse attention together; "
        "random queries and keys, so the lines of the plan that is timed are drawn, not estimated.",
    )
    return Result(SLUG, seed, metrics, time.perf_counter() - started, notes)


def claims(results: Sequence[Result]) -> list[Claim]:
    """The thresholds, on the means over seeds."""
    paper = "near dense on InfiniteBench and RULER; A-shape and static indices far behind"
    wanted = [
        ("dynamic columns and diagonals", "dense", -0.2, False),
        ("static columns and diagonals", "dense", 1.0, True),
        ("A-shape", "dense", 1.0, True),
    ]
    found = [
        Claim(
            text=f"{method}: nats on the repeat above {baseline}",
            ours=mean(results, f"repeat, {method}"),
            baseline=mean(results, f"repeat, {baseline}"),
            threshold=threshold,
            paper=paper,
            unit="nats",
            higher_is_better=worse,
        )
        for method, baseline, threshold, worse in wanted
    ]
    for method, threshold, worse in (
        ("dynamic", -0.05, False),
        ("static", 0.3, True),
        ("A-shape", 0.3, True),
    ):
        found.append(
            Claim(
                text=f"small model, {method}: nats a byte on the repeat above dense",
                ours=mean(results, f"bytes, repeat, {method}"),
                baseline=mean(results, "bytes, repeat, dense"),
                threshold=threshold,
                paper=paper,
                unit="nats a byte",
                higher_is_better=worse,
            )
        )
    singles = [mean(results, f"error, {_name(pattern)}") for pattern in PATTERNS]
    found.append(
        Claim(
            text="searched patterns against 1.05 of the best one for all heads: output error",
            ours=mean(results, "error, searched"),
            baseline=1.05 * min(singles),
            threshold=0.0,
            paper="a pattern per head is better than any one for all (ablation)",
            unit="relative L2, summed",
            higher_is_better=False,
        )
    )
    return found


def _bytes(seed: int) -> dict[str, float]:
    """The small model's nats by every choice of keys."""
    model = tiny_lm.load()
    draw = torch.Generator().manual_seed(seed)
    windows = recall.draw_windows(load_source_text().held_out, BYTE_PROMPTS, BYTES, draw)
    prompts = recall.repeat_passage(windows, (BYTE_REPEAT, BYTE_REPEAT), draw)
    dynamic = _OfAnother(0)
    metrics: dict[str, float] = {}
    for name in ("dense", "dynamic", "static", "A-shape", "blocks"):
        if name == "A-shape":
            selector: Any = _as_many(dynamic.kept)
        else:
            selector = {
                "dynamic": dynamic,
                "static": _OfAnother(1),
                "blocks": PooledBlockSelector(4, 16),
            }.get(name)
        if selector is not None:
            attach(model, selector)
        nats = passage_nats(model, *prompts, batch_size=BYTE_PROMPTS)
        detach_model(model)
        metrics[f"bytes, repeat, {name}"] = nats.repeat
        metrics[f"bytes, plain, {name}"] = nats.plain
    metrics["bytes, kept, dynamic"] = 100 * dynamic.kept
    return metrics


class _OfAnother(VerticalSlashSelector):
    """Every prompt reads the lines of the one so many places before it in the batch."""

    def __init__(self, places: int) -> None:
        super().__init__(**BYTE_LINES)
        self.places, self.kept = places, 0.0

    def estimate(self, ctx: AttentionContext, heads: Tensor) -> tuple[Tensor, Tensor]:
        columns, offsets = super().estimate(ctx, heads)
        return columns.roll(self.places, 0), offsets.roll(self.places, 0)

    def plan_prefill(self, ctx: AttentionContext) -> Plan:
        plan = super().plan_prefill(ctx)
        self.kept = self.kept or plan.density(ctx.shape)
        return plan


def _as_many(kept: float) -> AShapeSelector:
    """The A-shape with at least that share of the pairs."""
    shape = AttentionShape(1, 1, 1, BYTES, BYTES, causal=True)
    first = BYTE_LINES["force_first"]
    window = next(n for n in range(BYTES) if SpanPlan.uniform(first, n).density(shape) >= kept)
    return AShapeSelector(first, window)


def _searched(seed: int) -> dict[str, float]:
    """Summed relative errors of the heads' outputs: by the search, and by one pattern for all."""
    model = tiny_lm.load()
    draw = torch.Generator().manual_seed(seed)

    def text(part: str) -> Tensor:
        windows = recall.draw_windows(getattr(load_source_text(), part), 1, BYTES, draw)
        return recall.repeat_passage(windows, (BYTE_REPEAT, BYTE_REPEAT), draw)[0]

    found = search_patterns(model, text("train"), PATTERNS, **SEARCH).layers
    metrics = dict.fromkeys([f"error, {_name(p)}" for p in PATTERNS], 0.0)
    metrics["error, searched"] = 0.0
    for sample in [text("held_out") for _ in range(JUDGED_ON)]:
        for pattern in PATTERNS:
            for layer, scores in enumerate(
                search_patterns(model, sample, (pattern,), **SEARCH).scores
            ):
                metrics[f"error, {_name(pattern)}"] += sum(scores.values())
                metrics["error, searched"] += sum(
                    score for head, score in scores.items() if found[layer][head] == pattern
                )
    return metrics


def _name(pattern: HeadPattern) -> str:
    return f"{pattern.kind} {pattern.vertical} {pattern.slash}"


class _Recorded(VerticalSlashSelector):
    """Remembers the lines of each layer, or replays those of another prompt."""

    def __init__(self, replayed: dict[int, tuple[Tensor, Tensor]] | None = None) -> None:
        super().__init__(**LINES)
        self.lines: dict[int, tuple[Tensor, Tensor]] = {}
        self.replayed = replayed

    def estimate(self, ctx: AttentionContext, heads: Tensor) -> tuple[Tensor, Tensor]:
        if self.replayed is not None:
            return self.replayed[ctx.layer_idx]
        self.lines[ctx.layer_idx] = super().estimate(ctx, heads)
        return self.lines[ctx.layer_idx]


def _quality(seed: int) -> dict[str, float]:
    model, _ = model_and_windows(LENGTH)
    rows: dict[str, list[float]] = {}
    prompts = _prompts(seed)
    found = []
    for prompt in prompts:
        _note(rows, "dense", model, prompt, None)
        recorded = _Recorded()
        _note(rows, "dynamic columns and diagonals", model, prompt, recorded)
        found.append(recorded.lines)
        _note(rows, "A-shape", model, prompt, AShapeSelector(*A_SHAPE))
    for number, prompt in enumerate(prompts):
        other = _Recorded(found[(number + 1) % len(prompts)])
        _note(rows, "static columns and diagonals", model, prompt, other)
    return {name: sum(values) / len(values) for name, values in rows.items()}


@torch.no_grad()
def _note(
    rows: dict[str, list[float]], name: str, model: nn.Module, prompt: Tensor, selector: Any
) -> None:
    kept: list[float] = []
    if selector is not None:
        choose = selector.plan_prefill

        def counted(ctx: AttentionContext) -> Plan:
            plan: Plan = choose(ctx)
            if ctx.layer_idx == 0:
                kept.append(plan.density(ctx.shape))
            return plan

        selector.plan_prefill = counted
        attach(model, selector)
    try:
        logits = model(input_ids=prompt[None], use_cache=False).logits[0]
    finally:
        detach_model(model)
    losses = cross_entropy(logits[:-1].float(), prompt[1:], reduction="none")
    rows.setdefault(f"repeat, {name}", []).append(float(losses[-REPEATED + 4 :].mean()))
    rows.setdefault(f"plain, {name}", []).append(float(losses[256 : LENGTH - REPEATED].mean()))
    if kept:
        rows.setdefault(f"kept, {name}", []).append(100.0 * kept[0])


def _prompts(seed: int) -> list[Tensor]:
    """Running text whose end repeats a passage of its first three quarters."""
    _, windows = model_and_windows(LENGTH)
    draw = torch.Generator().manual_seed(seed)
    prompts = []
    for number in torch.randperm(len(windows), generator=draw)[:PROMPTS].tolist():
        text = windows[number].clone()
        start = int(torch.randint(64, 3 * LENGTH // 4 - REPEATED, (), generator=draw))
        text[-REPEATED:] = text[start : start + REPEATED]
        prompts.append(text)
    return prompts


@lru_cache(maxsize=1)
def _times() -> dict[str, float]:
    metrics: dict[str, float] = {}
    for length in TIMED:
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, generator=draw) for _ in range(3))
        shape = AttentionShape(1, HEADS, HEADS, length, length, causal=True)
        ctx = AttentionContext(q, k, v, shape, HEAD_DIM**-0.5)
        selector = VerticalSlashSelector(COLUMNS, RUNS * RUN)
        columns, offsets = _lines(length, draw)
        times: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            _timed(times, "dense", lambda q=q, k=k, v=v: _dense(q, k, v))
            _timed(times, "estimate", lambda c=ctx, s=selector: s.estimate(c, torch.arange(HEADS)))
            plan = _timed(
                times, "index", lambda c=columns, o=offsets, n=length: vertical_slash_plan(c, o, n)
            )
            _timed(times, "attention", lambda q=q, k=k, v=v, p=plan: _sparse(q, k, v, p))
        seconds = {name: median(values) for name, values in times.items()}
        whole = seconds["estimate"] + seconds["index"] + seconds["attention"]
        metrics[f"speed-up at {length}"] = seconds["dense"] / whole
        metrics[f"index at {length}, % of the whole"] = 100 * seconds["index"] / whole
        metrics[f"kept at {length}, %"] = 100 * plan.density(shape)
    return metrics


def _lines(length: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Drawn columns, and runs of neighbouring diagonals of which the first is the main one."""
    columns = torch.stack(
        [torch.randperm(length, generator=draw)[:COLUMNS].sort().values for _ in range(HEADS)]
    )
    starts = torch.randperm(length // RUN - 1, generator=draw)[: RUNS - 1].sort().values + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), starts * RUN])
    offsets = (starts[:, None] + torch.arange(RUN)).flatten()
    return columns[None], offsets.expand(1, HEADS, -1).contiguous()


def _timed(times: dict[str, list[float]], name: str, call: Any) -> Any:
    begin = time.perf_counter()
    result = call()
    times.setdefault(name, []).append(time.perf_counter() - begin)
    return result


@torch.no_grad()
def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


@torch.no_grad()
def _sparse(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Any:
    return attend(q, k, v, plan=plan, causal=True, validate=False)


if __name__ == "__main__":
    as_script(run, claims, SEEDS, threads=1)
