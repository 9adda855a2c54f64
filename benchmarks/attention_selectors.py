"""Whole selectors, the choice of keys included, against torch's dense attention.

    python benchmarks/attention_selectors.py [--quick] [--json] [--threads N] [--check] [--save]

Double Sparsity and MoA decode one token: the label of the new key, or its place in the rings, then
the choice, then attention; dense attention reads all keys and writes none. Steps alternate between
two caches, so that the second cache holds none of it. MoA and SeerAttention also read a prompt,
with the choice before it; SeerAttention's gate is random, which costs what a trained one
does. "choice" is the part of our time before attention begins, where it can be told apart.
Scatterbrain is exact on a window and estimates the rest by random features, all counted in.

The limit is what the keys, values and labels that are left would take at the bandwidth of memory,
or their multiply-adds at the measured peak.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import harness
from aerogel import kernels
from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    ChannelOrder,
    DoubleSparsitySelector,
    ElasticSpan,
    LocalSupport,
    MoAPlan,
    MoASelector,
    PositiveRandomFeatures,
    SeerAttentionSelector,
    attend,
    scatterbrain_attention,
    select,
)
from aerogel.attention.label_cache import LabelCacheLayer
from aerogel.attention.seer_gate import SeerGate
from aerogel.attention.span_cache import SpanCacheLayer
from harness import OURS, Call, Column, Contest, Figure, Findings, Setup

HEADS, DIM = 8, 64
GROUP_FACTOR = 4
# Tokens, bits of labels, runs -> what must be reached.
STEPS = {
    (32768, 16, 1): 3.5,
    (32768, 16, 16): 3.5,
    (32768, 4, 1): 5.0,
    (4096, 16, 1): 1.5,
    (4096, 4, 1): 1.5,
}
HEAVY = 512
PROMPT, PROMPT_HEADS = 8192, 4
SHARES = ((0.0, 0.125),) * 6 + ((0.0, 0.625),) * 2  # MoA: a quarter of the keys
RATIO, GATE_DIM = 0.1, 128
PROMPT_FLOORS = {"moa": 2.2, "seerattention": 4.0}
STEP_FLOOR = 2.5
MOST_CHOICE = 0.1  # of attention, SeerAttention
FEATURES, WINDOW = 64, 128  # Scatterbrain
SCATTERBRAIN_FLOORS = {False: 6.0, True: 3.0}  # causal or not

COLUMNS = (
    Column("what", "what"),
    Column("tokens", "tokens"),
    Column("density", "keys", ".1%"),
    Column("dense_ms", "dense ms", ".2f"),
    Column("ours_ms", "ours ms", ".2f"),
    Column("choice_ms", "choice ms", ".2f"),
    Column("times", "x dense", ".2f"),
    Column("limit", "limit", ".1f"),
)


@dataclass(frozen=True)
class Row:
    """One contest's result; `ours_ms` includes the choice."""

    what: str
    tokens: int
    density: float
    dense_ms: float
    ours_ms: float
    choice_ms: float | None
    times: float
    limit: float
    floor: float

    @property
    def figure(self) -> Figure:
        name = f"{self.what}, {self.tokens} tokens"
        return Figure(name, self.times, "x SDPA", self.floor, limit=self.limit)


def in_turn(calls: list[Call]) -> Call:
    """Each call runs the next of these."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def held(setup: Setup, calls: dict[str, Call]) -> Contest:
    contest = Contest(calls)
    contest.sweep(setup.timer, setup.rounds * setup.sweeps)
    return contest


def row_of(
    what: str, tokens: int, density: float, contest: Contest, least: float, floor: float
) -> Row:
    """`least` is how many seconds ours would take at the ceilings."""
    dense = contest.seconds("sdpa")
    choice = 1e3 * contest.seconds("choice") if "choice" in contest.times else None
    return Row(
        what,
        tokens,
        density,
        1e3 * dense,
        1e3 * contest.seconds(),
        choice,
        contest.times_faster("sdpa"),
        dense / least,
        floor,
    )


def memory_rate(setup: Setup) -> float:
    """Bytes a second."""
    return 1e9 * kernels.roofline(setup.threads, seconds=0.05).load_gbps_dram


def label_step(selector: DoubleSparsitySelector, q: Tensor, k: Tensor, v: Tensor) -> Call:
    layer = LabelCacheLayer(selector)
    layer.update(k, v)
    layer.append_labels(k, 0, HEADS)
    shape = AttentionShape.of(q, k, causal=True)
    ctx = AttentionContext(q, layer.keys, layer.values, shape, DIM**-0.5, cache_layer=layer)
    new = k[:, :, -1:]

    def step() -> Tensor | None:
        selector.labels_of(new, 0, HEADS)  # of the key that a step brings
        return selector.attention(ctx)

    return step


def double_sparsity_row(tokens: int, bits: int, run: int, setup: Setup) -> Row:
    order = ChannelOrder({0: torch.rand(HEADS, DIM).argsort(-1)})
    selector = DoubleSparsitySelector(
        order,
        HEAVY,
        GROUP_FACTOR,
        run,
        bits,
        dense_layers=(),
        dense_when_short=False,
    )
    q = torch.randn(1, HEADS, 1, DIM)
    caches = [torch.randn(2, 1, HEADS, tokens, DIM) for _ in range(2)]
    calls = {
        "sdpa": in_turn([lambda c=c: scaled_dot_product_attention(q, c[0], c[1]) for c in caches]),
        OURS: in_turn([label_step(selector, q, c[0], c[1]) for c in caches]),
    }
    rate = memory_rate(setup)
    contest = held(setup, calls)
    channels = DIM // GROUP_FACTOR
    label = 4 * channels if bits == 16 else channels * bits / 8 + 8
    least = HEADS * (tokens * label + 2 * HEAVY * DIM * 4) / rate
    what = f"double-sparsity step, labels of {32 if bits == 16 else bits} bits"
    what += f", runs of {run}" if run > 1 else ""
    return row_of(what, tokens, HEAVY / tokens, contest, least, STEPS[tokens, bits, run])


def moa_rows(setup: Setup) -> list[Row]:
    rules = [[ElasticSpan(*rule) for rule in SHARES]]
    selector = MoASelector(MoAPlan.of(rules), max_new=0, length=PROMPT)
    q, k, v = torch.randn(3, 1, HEADS, PROMPT, DIM)
    plan = selector.span(0, PROMPT)
    shape = AttentionShape.of(q, k, causal=True)
    flops = 4 * DIM * HEADS * PROMPT**2 / 2 * plan.density(shape)
    prompt = held(
        setup,
        {
            "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
            OURS: lambda: attend(q, k, v, plan=plan, causal=True, validate=False),
        },
    )
    row, key, value = torch.randn(3, 1, HEADS, 1, DIM)
    layers = []
    for _ in range(2):
        layer = SpanCacheLayer(selector.span(0, PROMPT, "token"), HEADS)
        layer.update(k, v)
        layers.append(layer)
    rate = memory_rate(setup)
    step = held(
        setup,
        {
            "sdpa": in_turn(
                [
                    lambda c=c: scaled_dot_product_attention(row, c[0], c[1])
                    for c in ((k, v), (v, k))
                ]
            ),
            OURS: in_turn([ring_step(layer, row, key, value) for layer in layers]),
        },
    )
    share = int(layers[0].offsets[-1]) / (HEADS * PROMPT)
    least = 2 * 4 * DIM * HEADS * PROMPT * share / rate
    peak = 1e9 * setup.roof.fma_gflops
    return [
        row_of("moa prompt", PROMPT, plan.density(shape), prompt, flops / peak,
               PROMPT_FLOORS["moa"]),
        row_of("moa step", PROMPT, share, step, least, STEP_FLOOR),
    ]  # fmt: skip


def ring_step(layer: SpanCacheLayer, row: Tensor, key: Tensor, value: Tensor) -> Call:
    def step() -> Tensor:
        return layer.attend(row, *layer.update(key, value))

    return step


def seer_row(setup: Setup) -> Row:
    gate = SeerGate(PROMPT_HEADS, PROMPT_HEADS, DIM, gate_dim=GATE_DIM)
    selector = SeerAttentionSelector({0: gate}, method="ratio", ratio=RATIO)
    q, k, v = torch.randn(3, 1, PROMPT_HEADS, PROMPT, DIM)
    shape = AttentionShape.of(q, k, causal=True)
    ctx = AttentionContext(q, k, v, shape, DIM**-0.5, q_pre=q, k_pre=k)
    density = select(selector, ctx).density(shape)
    contest = held(
        setup,
        {
            "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
            "choice": lambda: select(selector, ctx),
            OURS: lambda: attend(q, k, v, plan=select(selector, ctx), causal=True, validate=False),
        },
    )
    least = 4 * DIM * PROMPT_HEADS * PROMPT**2 / 2 * density / (1e9 * setup.roof.fma_gflops)
    return row_of(
        "seerattention prompt", PROMPT, density, contest, least, PROMPT_FLOORS["seerattention"]
    )


def scatterbrain_row(setup: Setup, causal: bool) -> Row:
    q, k, v = torch.randn(3, 1, PROMPT_HEADS, PROMPT, DIM)
    features, support = PositiveRandomFeatures(DIM, FEATURES), LocalSupport(WINDOW)
    contest = held(
        setup,
        {
            "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=causal),
            OURS: lambda: scatterbrain_attention(q, k, v, features, support, causal=causal),
        },
    )
    keys = WINDOW // 2 + 1 if causal else WINDOW
    # Multiply-adds of a row: projections of q and k, both products on the window (and the estimates
    # to be taken out, if not causal), and the sums over all keys.
    row = FEATURES * DIM + 2 * keys * DIM + (0 if causal else keys * (FEATURES + DIM))
    row += 2 * FEATURES * DIM
    least = 2 * PROMPT_HEADS * PROMPT * row / (1e9 * setup.roof.fma_gflops)
    density = keys / (PROMPT / 2 if causal else PROMPT)
    what = "scatterbrain, causal" if causal else "scatterbrain"
    return row_of(what, PROMPT, density, contest, least, SCATTERBRAIN_FLOORS[causal])


def choice_figure(row: Row) -> Figure:
    assert row.choice_ms is not None
    share = row.choice_ms / (row.ours_ms - row.choice_ms)
    return Figure(f"{row.what}, the choice", share, "of the attention", most=MOST_CHOICE)


def measure(setup: Setup) -> Findings:
    with torch.no_grad():
        steps = list(STEPS)[:: 3 if setup.quick else 1]
        rows = [double_sparsity_row(*step, setup) for step in steps]
        rows += moa_rows(setup)
        seer = seer_row(setup)
        rows.append(seer)
        rows += [scatterbrain_row(setup, causal) for causal in SCATTERBRAIN_FLOORS]
    notes = [
        f"Heads of {DIM} dimensions, float32: {HEADS}, SeerAttention {PROMPT_HEADS}. Double "
        f"Sparsity reads {HEAVY} keys; labels have {DIM // GROUP_FACTOR} channels. Scatterbrain: "
        f"{PROMPT_HEADS} heads, {FEATURES} features, a window of {WINDOW}.",
    ]
    figures = [row.figure for row in rows] + [choice_figure(seer)]
    return Findings(COLUMNS, rows, figures, notes)


def main() -> int:
    return harness.run(__doc__, measure, rounds=3, quick_rounds=3)


if __name__ == "__main__":
    sys.exit(main())
