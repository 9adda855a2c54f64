"""Attention over lists of keys against torch's dense attention and FlexAttention.

    python benchmarks/attention.py [--quick] [--json] [--threads N] [--check] [--save]

Prefill and its backward pass read blocks of 64 x 64, drawn at random for each head, the diagonal
always among them; 10 % are 10 % of the causal half. Decoding reads 1/16 of 32k keys, in runs of
64 or 16 and one by one, which differ from call to call, so that they come from memory. Lists are
given: what a selector costs is not in these figures, what it costs to make tiles of them is in the
column "tiles", and counts.

The limit is what the multiply-adds that are left would take at the measured peak, or the keys and
values at the bandwidth of memory, which is measured again before every such row. FlexAttention is
compiled, and meets our kernel in a process of its own for every length, since a second length in
one process may fail to compile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from aerogel import kernels
from harness import OURS, Call, Column, Contest, Figure, Findings, Setup, Timer

BLOCK = 64
DIM = 64
# Tokens -> heads: a call of dense attention takes about a second at most.
PREFILLS = {4096: 8, 8192: 4, 16384: 2}
DENSITIES = (1.0, 0.25, 0.1, 0.05)
BACKWARD_TOKENS, BACKWARD_HEADS = 4096, 4
DECODE_TOKENS, DECODE_HEADS, DECODE_SHARE = 32768, 8, 16
RUNS = (64, 16, 1)
FLEX_TOKENS = (4096, 8192)
FLEX_DENSITY = 0.1
FLEX_SECONDS = 1800  # compiling included
SHARE_OF_DENSE = 0.8  # of 1 / density, up to a quarter: what must be reached
# (rows, tokens at least, density or run): what must be reached, where it should be.
PREFILL_AIMS = {1.0: (1.0, 1.1), 0.1: (9.0, 11.5)}
DECODE_AIMS = {64: (12.0, 20.0), 16: (12.0, 20.0), 1: (5.0, 8.0)}
FLEX_AIMS = (1.8, 2.4)

COLUMNS = (
    Column("what", "what"),
    Column("tokens", "tokens"),
    Column("density", "keys", ".1%"),
    Column("run", "in runs of"),
    Column("peer", "dense call"),
    Column("peer_ms", "dense ms", ".2f"),
    Column("ours_ms", "ours ms", ".2f"),
    Column("tiles_ms", "tiles ms", ".3f"),
    Column("times", "x dense", ".2f"),
    Column("limit", "limit", ".1f"),
    Column("rate", "GFLOP/s, GB/s", ".1f"),
)


@dataclass(frozen=True)
class Row:
    """One contest's result; `times` counts the making of tiles as ours."""

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
    copies = [torch.randn(2, 1, DECODE_HEADS, DECODE_TOKENS, DIM) for _ in range(2)]

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
    contest.sweep(setup.timer, setup.rounds * setup.sweeps)
    nbytes = copies[0].numel() * 4 / DECODE_SHARE
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
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask)


def flex_worker(tokens: int, threads: int, rounds: int) -> dict[str, float]:
    """Both on one mask, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    heads = PREFILLS[tokens]
    q, k, v = operands(heads, tokens)
    blocks = Blocks.random(heads, tokens, FLEX_DENSITY)
    make = tiles_of(blocks)
    stream = make()
    with torch.no_grad():
        flex = flex_call(q, k, v, blocks)
        torch.testing.assert_close(flex(), attend(q, k, v, stream)[0], rtol=1e-4, atol=1e-5)
        contest = Contest({"flex": flex, "tiles": make, OURS: lambda: attend(q, k, v, stream)})
        contest.sweep(Timer(threads), rounds)
    flops = half_flops(heads, tokens, 2) * blocks.density
    name = ("prefill", tokens, blocks.density, BLOCK)
    row = row_of(name, contest, "flex", flops, 1e-9 * flops / contest.seconds())
    return vars(row)


def flex_row(tokens: int, setup: Setup) -> Row | str:
    """The row, or why there is none."""
    rounds = str(setup.rounds * setup.sweeps)
    arguments = ["--flex", str(tokens), "--threads", str(setup.threads), "--rounds", rounds]
    try:
        done = subprocess.run(
            [sys.executable, __file__, *arguments],
            capture_output=True,
            text=True,
            timeout=FLEX_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"FlexAttention at {tokens} tokens took more than {FLEX_SECONDS} s."
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return f"FlexAttention at {tokens} tokens did not run: {last}"
    found = json.loads(done.stdout.splitlines()[-1])
    found["limit"] = 1e-3 * found["peer_ms"] * 1e9 * setup.roof.fma_gflops / found["limit"]
    return Row(**found)


def figure_of(row: Row) -> Figure:
    floor: float | None = None
    aim: float | None = None
    unit = "x SDPA" if row.peer == "sdpa" else "x FlexAttention"
    share = min(DENSITIES, key=lambda d: abs(d - row.density))
    if row.peer == "flex":
        name = f"prefill, {row.tokens} tokens, {row.density:.0%} of blocks"
        floor, aim = FLEX_AIMS if row.tokens >= 8192 else (None, None)
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


def main() -> int:
    if "--flex" in sys.argv:
        parser = argparse.ArgumentParser()
        for name in ("--flex", "--threads", "--rounds"):
            parser.add_argument(name, type=int, required=True)
        options = parser.parse_args()
        print(json.dumps(flex_worker(options.flex, options.threads, options.rounds)))
        return 0
    return harness.run(__doc__, measure, rounds=3, quick_rounds=2, options=add_options)


if __name__ == "__main__":
    sys.exit(main())
