"""Attention over lists of keys against torch's dense attention and FlexAttention.

    python benchmarks/attention.py [--quick] [--json] [--threads N] [--check] [--save]

Prefill and its backward pass read blocks of 64 x 64, drawn at random for each head, the diagonal
always among them; 10 % are 10 % of the causal half. Decoding reads 1/16 of 32k keys, in runs of
64 or 16 and one by one, which differ from call to call, so that they come from memory; keys and
values lie in huge pages, for everybody, as our KV caches keep them. Lists are given: what a
selector costs is not in these figures, what it costs to make tiles of them is in the column
"tiles", and counts.

"minference" is a whole call: columns and diagonals are estimated from the queries and keys, tiles
are made of them, and attention runs; the estimate's share stands in the column "tiles", too.
Queries and keys there are made to have what heads have that were trained: columns, and runs of
diagonals at a few distances.

The limit is what the multiply-adds that are left would take at the measured peak, or the keys and
values at the bandwidth of memory, which is measured again before every such row. FlexAttention is
compiled for each length, with static shapes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from aerogel import kernels
from aerogel.attention import (
    AttentionContext,
    AttentionShape,
    Plan,
    select,
    sparse_attention,
)
from aerogel.attention.prompt_patterns import VerticalSlashSelector
from aerogel.kernels.huge_pages import empty_rows
from harness import OURS, Call, Column, Contest, Figure, Findings, Setup

BLOCK = 64
DIM = 64
# Tokens -> heads: a call of dense attention takes about a second at most.
PREFILLS = {4096: 8, 8192: 4, 16384: 2}
DENSITIES = (1.0, 0.25, 0.1, 0.05)
BACKWARD_TOKENS, BACKWARD_HEADS = 4096, 4
DECODE_TOKENS, DECODE_HEADS, DECODE_SHARE = 32768, 8, 16
DECODE_SAMPLES = 5  # for each of a prompt's: a call takes a thousandth of its time
RUNS = (64, 16, 1)
FLEX_TOKENS = (8192, 16384)
FLEX_DENSITY = 0.1
PROMPT_TOKENS, PROMPT_HEADS, PROMPT_DENSITY = 16384, 4, 0.1
PROMPT_COLUMNS = 256
SLOWEST = 1e-4  # radians a token; the fastest turns a thousand times as fast
PLACES, COLUMN_KEYS, PLAIN = (
    6,
    64,
    8,
)  # of an estimated head's diagonals; columns; unturned channels
SHARE_OF_DENSE = 0.8  # of 1 / density, up to a quarter: what must be reached
# (rows, tokens at least, density or run): what must be reached, where it should be.
PREFILL_AIMS = {1.0: (1.0, 1.1), 0.1: (9.0, 11.5)}
DECODE_AIMS = {64: (12.0, 20.0), 16: (12.0, 20.0), 1: (5.0, 8.0)}
FLEX_AIMS = (1.8, 2.4)
PROMPT_AIMS = (5.0, 7.0)

COLUMNS = (
    Column("what", "what"),
    Column("tokens", "tokens"),
    Column("density", "keys", ".1%"),
    Column("run", "in runs of"),
    Column("peer", "dense call"),
    Column("peer_ms", "dense ms", ".2f"),
    Column("ours_ms", "ours ms", ".2f"),
    Column("tiles_ms", "tiles, choice ms", ".3f"),
    Column("times", "x dense", ".2f"),
    Column("limit", "limit", ".1f"),
    Column("rate", "GFLOP/s, GB/s", ".1f"),
)


@dataclass(frozen=True)
class Row:
    """One contest's result; `times` counts the making of tiles, and a choice, as ours."""

    what: str
    tokens: int
    density: float
    run: int
    peer: str
    peer_ms: float
    ours_ms: float
    tiles_ms: float
    times: float
    limit: float
    rate: float


@dataclass(frozen=True)
class Blocks:
    """Blocks of one plan: which, and how many there are of the causal half."""

    kept: Tensor  # (heads, tiles, tiles) bool
    density: float

    @classmethod
    def random(cls, heads: int, tokens: int, density: float) -> Blocks:
        """Exactly so many blocks of each head, as far as whole blocks go."""
        tiles = tokens // BLOCK
        half = torch.ones(tiles, tiles, dtype=torch.bool).tril()
        score = torch.rand(heads, tiles, tiles).masked_fill(~half, -1.0)
        score += 2.0 * torch.eye(tiles)
        count = round(density * int(half.sum()))
        chosen = score.flatten(1).topk(count, dim=1).indices
        kept = torch.zeros(heads, tiles * tiles, dtype=torch.bool).scatter_(1, chosen, True)
        return cls(kept.view(heads, tiles, tiles), count / int(half.sum()))

    def lists(self) -> tuple[Tensor, Tensor]:
        """Pointers and columns, as a plan has them."""
        counts = self.kept.flatten(0, 1).sum(1)
        return F.pad(counts.cumsum(0), (1, 0)), self.kept.nonzero()[:, 2].int()


def tiles_of(blocks: Blocks) -> Callable[[], kernels.TileStream]:
    heads, tiles, _ = blocks.kept.shape
    ptr, col = blocks.lists()
    tokens = tiles * BLOCK
    return lambda: kernels.lower_ranges(
        ptr,
        col,
        BLOCK,
        unit=BLOCK,
        Bp=1,
        Hp=heads,
        block_q=BLOCK,
        q_len=tokens,
        k_len=tokens,
        causal=True,
    )


def attend(q: Tensor, k: Tensor, v: Tensor, stream: kernels.TileStream) -> tuple[Tensor, Tensor]:
    return kernels.attention_forward(
        q, k, v, *stream[:5], Bp=1, Hp=q.shape[1], block_q=BLOCK, causal=True
    )


def operands(heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, heads, tokens, DIM)
    return q, k, v


def half_flops(heads: int, tokens: int, products: int) -> float:
    """Of the causal half, two for a multiply-add."""
    return products * DIM * heads * tokens**2


def row_of(
    name: tuple[str, int, float, int], contest: Contest, peer: str, limit: float, rate: float
) -> Row:
    ours, tiles = contest.seconds(), contest.seconds("tiles")
    return Row(
        *name,
        peer,
        1e3 * contest.seconds(peer),
        1e3 * ours,
        1e3 * tiles,
        contest.times_faster(peer) * ours / (ours + tiles),
        limit,
        rate,
    )


def prefill_row(tokens: int, density: float, setup: Setup) -> Row:
    heads = PREFILLS[tokens]
    q, k, v = operands(heads, tokens)
    blocks = Blocks.random(heads, tokens, density)
    make = tiles_of(blocks)
    stream = make()
    contest = Contest(
        {
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "tiles": make,
            OURS: lambda: attend(q, k, v, stream),
        }
    )
    contest.sweep(setup.timer, setup.rounds * setup.sweeps)
    flops = half_flops(heads, tokens, 2) * blocks.density
    limit = contest.seconds("sdpa") * 1e9 * setup.roof.fma_gflops / flops
    name = ("prefill", tokens, blocks.density, BLOCK)
    return row_of(name, contest, "sdpa", limit, 1e-9 * flops / contest.seconds())


def backward_row(density: float, setup: Setup) -> Row:
    heads, tokens = BACKWARD_HEADS, BACKWARD_TOKENS
    q, k, v = operands(heads, tokens)
    do = torch.randn_like(q)
    blocks = Blocks.random(heads, tokens, density)
    make = tiles_of(blocks)
    stream = make()
    o, lse = attend(q, k, v, stream)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        dense = F.scaled_dot_product_attention(*inputs, is_causal=True)

    def backward() -> object:
        return kernels.attention_backward(
            q,
            k,
            v,
            *stream[:5],
            None,
            o,
            lse,
            do,
            Bp=1,
            Hp=heads,
            block_q=BLOCK,
            causal=True,
        )

    contest = Contest(
        {
            "sdpa": lambda: torch.autograd.grad(dense, inputs, do, retain_graph=True),
            "tiles": make,
            OURS: backward,
        }
    )
    contest.sweep(setup.timer, setup.rounds * setup.sweeps)
    flops = half_flops(heads, tokens, 5) * blocks.density
    limit = contest.seconds("sdpa") * 1e9 * setup.roof.fma_gflops / flops
    name = ("backward", tokens, blocks.density, BLOCK)
    return row_of(name, contest, "sdpa", limit, 1e-9 * flops / contest.seconds())


def in_turn(calls: list[Call]) -> Call:
    """Each call runs the next of these."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def decode_lists(run: int) -> list[tuple[Tensor, Tensor]]:
    """Disjoint lists of runs that cover all keys together: pointers and numbers of runs."""
    runs = DECODE_TOKENS // run
    order = torch.stack([torch.randperm(runs) for _ in range(DECODE_HEADS)])
    ptr = torch.arange(DECODE_HEADS + 1) * (runs // DECODE_SHARE)
    return [(ptr, part.sort(1).values.flatten().int()) for part in order.chunk(DECODE_SHARE, 1)]


def decode_row(run: int, setup: Setup) -> Row:
    q = torch.randn(1, DECODE_HEADS, 1, DIM)
    copies = [
        tuple(empty_rows(q, 1, DECODE_HEADS, DECODE_TOKENS, DIM).normal_() for _ in range(2))
        for _ in range(2)
    ]

    def lower(ptr: Tensor, runs: Tensor) -> kernels.TileStream:
        none = runs[:0]
        ranges = (ptr, runs, run) if run > 1 else (torch.zeros_like(ptr), none, 1)
        return kernels.lower_ranges(
            *ranges,
            unit=run,
            token_ptr=None if run > 1 else ptr,
            token=None if run > 1 else runs,
            Bp=1,
            Hp=DECODE_HEADS,
            block_q=1,
            q_len=1,
            k_len=DECODE_TOKENS,
            causal=True,
        )

    def call(k: Tensor, v: Tensor, stream: kernels.TileStream) -> Call:
        return lambda: kernels.attention_forward(
            q, k, v, *stream[:5], Bp=1, Hp=DECODE_HEADS, block_q=1, causal=True
        )

    lists = decode_lists(run)
    streams = [lower(*part) for part in lists]
    contest = Contest(
        {
            "sdpa": in_turn(
                [lambda c=c: F.scaled_dot_product_attention(q, c[0], c[1]) for c in copies]
            ),
            "tiles": in_turn([lambda p=p: lower(*p) for p in lists]),
            OURS: in_turn([call(*c, stream) for stream in streams for c in copies]),
        }
    )
    memory = kernels.roofline(setup.threads, seconds=0.05).load_gbps_dram
    contest.sweep(setup.timer, DECODE_SAMPLES * setup.rounds * setup.sweeps)
    nbytes = 2 * copies[0][0].numel() * 4 / DECODE_SHARE
    limit = contest.seconds("sdpa") * 1e9 * memory / nbytes
    name = ("decode", DECODE_TOKENS, 1 / DECODE_SHARE, run)
    return row_of(name, contest, "sdpa", limit, 1e-9 * nbytes / contest.seconds())


def flex_call(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Call:
    """FlexAttention, compiled, on the same blocks: only the diagonal ones are masked inside."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tiles = blocks.kept.shape[-1]
    diagonal = torch.eye(tiles, dtype=torch.bool)

    def numbers(kept: Tensor) -> tuple[Tensor, Tensor]:
        order = kept.int().argsort(dim=-1, descending=True, stable=True)
        return kept.sum(-1).int()[None], order.int()[None]

    def causal(b: Tensor, h: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        return q_at >= k_at

    mask = BlockMask.from_kv_blocks(
        *numbers(blocks.kept & diagonal),
        *numbers(blocks.kept & ~diagonal),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=causal,
        seq_lengths=(tiles * BLOCK, tiles * BLOCK),
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def flex_row(tokens: int, setup: Setup) -> Row | str:
    """The row, or why there is none."""
    heads = PREFILLS[tokens]
    q, k, v = operands(heads, tokens)
    blocks = Blocks.random(heads, tokens, FLEX_DENSITY)
    make = tiles_of(blocks)
    stream = make()
    flex = flex_call(q, k, v, blocks)
    try:
        out = flex()
    except Exception as error:  # whatever its compiler did not like
        last = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"FlexAttention at {tokens} tokens did not run: {last}"
    torch.testing.assert_close(out, attend(q, k, v, stream)[0], rtol=1e-4, atol=1e-5)
    contest = Contest({"flex": flex, "tiles": make, OURS: lambda: attend(q, k, v, stream)})
    contest.sweep(setup.timer, setup.rounds * setup.sweeps)
    flops = half_flops(heads, tokens, 2) * blocks.density
    limit = contest.seconds("flex") * 1e9 * setup.roof.fma_gflops / flops
    name = ("prefill", tokens, blocks.density, BLOCK)
    return row_of(name, contest, "flex", limit, 1e-9 * flops / contest.seconds())


def trained_like(heads: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of heads that look at some columns and at some distances.

    Channels but for the last few are turned by position, as rotary embeddings do: a query is a
    head's vector at its own position, a key the sum of that vector at later ones.
    """
    turned = DIM - PLAIN
    frequency = SLOWEST * 1e3 ** (torch.arange(turned // 2) * 2 / turned)
    places = torch.randint(0, tokens // 2, (heads, PLACES)).float()
    places[:, 0] = 0
    angle = torch.arange(tokens)[:, None] * frequency
    phase = torch.rand(heads, 1, turned // 2) * 2 * torch.pi

    def at(angles: Tensor) -> Tensor:
        return torch.cat([angles.cos(), angles.sin()], -1)

    q = at(angle + phase)
    k = sum(at(angle + places[:, i, None, None] * frequency + phase) for i in range(PLACES))
    columns = torch.zeros(heads, tokens, 1)
    for head in range(heads):
        columns[head, torch.randperm(tokens)[:COLUMN_KEYS]] = 24 / PLAIN
    q = torch.cat([q, torch.ones(heads, tokens, PLAIN)], -1) * 2
    k = torch.cat([k, columns.expand(-1, -1, PLAIN)], -1) * 2
    noise = torch.randn(2, 1, heads, tokens, DIM)
    return q[None] + noise[0], k[None] + noise[1], torch.randn(1, heads, tokens, DIM)


def minference_row(setup: Setup) -> Row:
    heads, tokens = PROMPT_HEADS, PROMPT_TOKENS
    q, k, v = trained_like(heads, tokens)
    shape = AttentionShape.of(q, k, causal=True)
    context = AttentionContext(q, k, v, shape, DIM**-0.5)

    def chosen(diagonals: int) -> VerticalSlashSelector:
        return VerticalSlashSelector(PROMPT_COLUMNS, diagonals)

    # As many diagonals as make a tenth of the pairs.
    low, high = 50, tokens
    while high - low > 4:
        middle = (low + high) // 2
        kept = select(chosen(middle), context).density(shape)
        low, high = (middle, high) if kept <= PROMPT_DENSITY else (low, middle)
    selector = chosen(low)
    density = select(selector, context).density(shape)
    contest = Contest(
        {
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "tiles": lambda: select(selector, context),
            OURS: lambda: whole_call(q, k, v, select(selector, context)),
        }
    )
    contest.sweep(setup.timer, setup.rounds * setup.sweeps)
    flops = half_flops(heads, tokens, 2) * density
    limit = contest.seconds("sdpa") * 1e9 * setup.roof.fma_gflops / flops
    times = {name: 1e3 * contest.seconds(name) for name in ("sdpa", OURS, "tiles")}
    return Row(
        *("minference", tokens, density, 0, "sdpa"),
        *times.values(),
        contest.times_faster("sdpa"),
        limit,
        1e-9 * flops / contest.seconds(),
    )


def whole_call(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> object:
    return sparse_attention(q, k, v, plan=plan, causal=True, validate=False)


def figure_of(row: Row) -> Figure:
    floor: float | None = None
    aim: float | None = None
    unit = "x SDPA" if row.peer == "sdpa" else "x FlexAttention"
    share = min(DENSITIES, key=lambda d: abs(d - row.density))
    if row.peer == "flex":
        name = f"prefill, {row.tokens} tokens, {row.density:.0%} of blocks"
        floor, aim = FLEX_AIMS if row.tokens >= 8192 else (None, None)
    elif row.what == "minference":
        name = f"minference, {row.tokens} tokens, {1 - row.density:.0%} zeros, choice included"
        floor, aim = PROMPT_AIMS
    elif row.what == "decode":
        single = "one by one" if row.run == 1 else f"in runs of {row.run}"
        name = f"decode, 1/{DECODE_SHARE} of {row.tokens} keys {single}"
        floor, aim = DECODE_AIMS[row.run]
    else:
        name = f"{row.what}, {row.tokens} tokens, {row.density:.0%} of blocks"
        if share <= 0.25:
            floor = SHARE_OF_DENSE / row.density
        if share in PREFILL_AIMS and (share == 1.0 or row.tokens >= 8192):
            floor, aim = PREFILL_AIMS[share]
    return Figure(name, row.times, unit, floor, aim, limit=row.limit)


def measure(setup: Setup) -> Findings:
    rows: list[Row] = []
    notes = [
        f"One head has {DIM} dimensions; float32. Heads: "
        + ", ".join(f"{heads} at {tokens}" for tokens, heads in PREFILLS.items())
        + f", {BACKWARD_HEADS} backward, {DECODE_HEADS} decoding.",
        "The time of making tiles is counted as ours in the factors.",
    ]
    densities = (1.0, 0.1) if setup.quick else DENSITIES
    with torch.no_grad():
        for tokens in list(PREFILLS)[: 1 if setup.quick else None]:
            rows += [prefill_row(tokens, density, setup) for density in densities]
        rows += [backward_row(density, setup) for density in densities]
        rows.append(minference_row(setup))
        rows += [decode_row(run, setup) for run in RUNS]
        for tokens in () if setup.quick or setup.options.no_flex else FLEX_TOKENS:
            found = flex_row(tokens, setup)
            if isinstance(found, Row):
                rows.append(found)
            else:
                notes.append(found)
    return Findings(COLUMNS, rows, [figure_of(row) for row in rows], notes)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=3, quick_rounds=2, options=add_options))
