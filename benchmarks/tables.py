"""Lookups and searches in a sparse embedding table against the dense one.

    python benchmarks/tables.py [--quick] [--json] [--threads N] [--check] [--save]

A table of 100,000 rows of 64 with 80 % zeros, as dynamic sparse learning leaves it. A lookup turns
ids, drawn anew for every call, into dense rows, against `nn.Embedding` with the same numbers; a
search finds the 20 best rows for 64 queries, against `torch.mm` and `topk`. Calls take turns; see
harness.py. A lookup of few ids is mostly the call itself; one of many waits for memory.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import harness
from aerogel.models import SparseEmbeddingTable
from harness import Call, Column, Contest, Figure, Findings, Setup, ratio

ROWS, DIM, DENSITY = 100_000, 64, 0.2
IDS = (64, 1024, 16_384)
DRAWS = 16  # lists of ids that take turns
QUERIES, BEST = 64, 20
VALUES = (torch.float32, torch.float16)
SLOWEST_LOOKUP, SLOWEST_SEARCH = 1.5, 1.3  # times nn.Embedding's; times faster than dense

COLUMNS = (
    Column("call", "call"),
    Column("dense_us", "dense us", ".1f"),
    Column("ours_us", "ours us", ".1f"),
    Column("times_slower", "x the dense time", ".2f"),
    Column("bytes", "of the dense bytes", ".0%"),
)


def table_of(weight: Tensor, dtype: torch.dtype) -> SparseEmbeddingTable:
    return SparseEmbeddingTable.from_masked(weight, dtype)


def lookups(table: Callable[[Tensor], Tensor], count: int) -> Call:
    """A call that asks for other ids each time."""
    draws = itertools.cycle([torch.randint(0, ROWS, (count,)) for _ in range(DRAWS)])
    return lambda: table(next(draws))


def contests(setup: Setup) -> dict[str, tuple[Contest, float]]:
    """By name: who competes, and the table's share of the dense bytes."""
    weight = torch.randn(ROWS, DIM) * (torch.rand(ROWS, DIM) < DENSITY)
    dense, found = nn.Embedding.from_pretrained(weight), {}
    for dtype in VALUES[:1] if setup.quick else VALUES:
        table = table_of(weight, dtype)
        for count in IDS:
            calls = {"dense": lookups(dense, count), "ours": lookups(table, count)}
            name = f"lookup of {count:,} ids, {str(dtype).removeprefix('torch.')}"
            found[name] = Contest(calls), table.nbytes / weight.nbytes
    table, queries = table_of(weight, torch.float32), torch.randn(QUERIES, DIM)
    calls = {
        "dense": lambda: torch.mm(queries, weight.t()).topk(BEST),
        "ours": lambda: table.topk(queries, BEST),
    }
    found[f"best {BEST} for {QUERIES} queries"] = Contest(calls), table.nbytes / weight.nbytes
    return found


@torch.no_grad()
def measure(setup: Setup) -> Findings:
    named = contests(setup)
    harness.hold([contest for contest, _ in named.values()], setup)
    rows: list[dict[str, Any]] = []
    figures = []
    for name, (contest, share) in named.items():
        slower = ratio(contest.times["ours"], contest.times["dense"])
        rows.append(
            {
                "call": name,
                "dense_us": 1e6 * contest.seconds("dense"),
                "ours_us": 1e6 * contest.seconds(),
                "times_slower": slower,
                "bytes": share,
            }
        )
        if name.startswith("lookup"):
            figures.append(Figure(name, slower, "x nn.Embedding's time", most=SLOWEST_LOOKUP))
        else:
            faster = contest.times_faster("dense")
            figures.append(Figure(name, faster, "x torch.mm and topk", SLOWEST_SEARCH))
    return Findings(COLUMNS, rows, figures)


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=15))
