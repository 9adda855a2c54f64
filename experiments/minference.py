"""MInference on a pretrained language model: a repeated passage is found through few keys.

SmolLM2-135M-Instruct (30 Llama layers, 9 query and 3 key heads; stored in 4 bits, here
dequantised) reads prompts of 1024 tokens of Python's documentation (`pydoc_data.topics`) whose last
128 tokens repeat an earlier passage. A model that still sees that passage predicts the repeat; one
that does not, cannot. All layers are sparse, with 64 columns and 128 diagonals per head, kept
per token (tiles of one row), so that the kept pairs are those lines and nothing beside them. The
same sizes with the lines of another prompt, and an A-shape of 16 first tokens and a window of 176,
show whether choosing anew for each prompt matters. A seed draws two prompts.

The second part is time: one prompt of 4 heads of 64 at 4,096 to 16,384 tokens, random tensors,
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

from aerogel.attention import AttentionContext, AttentionShape, Plan, attach, attend
from aerogel.attention import detach as detach_model
from aerogel.attention.prompt_patterns import AShapeSelector, VerticalSlashSelector
from aerogel.attention.vertical_slash import vertical_slash_plan
from aerogel.kernels import native_available
from aerogel.report.evidence import Claim, Result, as_script, mean
from smollm2_topics import model_and_windows

SLUG = "minference"
SEEDS = (0, 1)

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

TIMED, HEADS, HEAD_DIM, COLUMNS, RUNS, RUN, ROUNDS = (4096, 8192, 16384), 4, 64, 256, 6, 64, 3


def run(seed: int) -> Result:
    """Score the repeated passage under every choice of keys; time prompts."""
    started = time.perf_counter()
    metrics = _quality(seed)
    if native_available():
        metrics.update(_times())
    notes = (
        f"Nats per token, means over {PROMPTS} prompts of {LENGTH} tokens a seed. Plain: tokens "
        "256 to 896. Kept: share of the causal pairs that the first layer reads.",
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
    return [
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
