"""Training steps on stored weights only against the same steps dense in torch, in one process.

    python benchmarks/sparse_training.py [--quick] [--json] [--threads N] [--check]

A step is forward, backward and AdamW of a feed-forward block 768-3072-768 with GELU, and its input
asks for a gradient, as inside a network. Dense and sparse steps take turns, phase by phase timed; a
ratio is taken in every round, and the median of the ratios is printed. The sparse layers find their
variants in untimed steps first. One thread is timed by its CPU time, several by the wall clock.
Freed memory stays in the process, so that nobody's activations cost page faults.

Below every block, the three products of its first layer alone: milliseconds dense and sparse.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aerogel import kernels
from aerogel.train import sparse_training
from aerogel.train.allocator import keep_freed_memory

WIDTH, HIDDEN = 768, 3072
TOKENS = (256, 1024)
SPARSITIES = (0.8, 0.9, 0.95)
WARM_UP = 30  # sparse steps: more than variants times tries
PHASES = ("forward", "backward", "optimizer")
PRODUCTS = ("output", "input gradient", "weight gradient")
FLOOR = 2.0  # times dense at 90 % zeros on one thread

Clock = Callable[[], float]


@dataclass(frozen=True)
class Row:
    """One block at one sparsity; times in milliseconds, shares of the step."""

    tokens: int
    sparsity: float
    dense_ms: float
    sparse_ms: float
    times_dense: float
    dense_shares: dict[str, float]
    sparse_shares: dict[str, float]
    dense_products_ms: dict[str, float]
    sparse_products_ms: dict[str, float]


class Contestant:
    """A block with its optimizer, one timed step at a time."""

    def __init__(self, model: nn.Module, x: Tensor, clock: Clock) -> None:
        self.model = model
        self._x = x.clone().requires_grad_()
        self._gradient = torch.randn(x.shape)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self._clock = clock

    def step(self) -> dict[str, float]:
        """Milliseconds by phase."""
        self._optimizer.zero_grad()
        self._x.grad = None
        times = [self._clock()]
        y = self.model(self._x)
        times.append(self._clock())
        y.backward(self._gradient)
        times.append(self._clock())
        self._optimizer.step()
        times.append(self._clock())
        return {p: (b - a) * 1e3 for p, a, b in zip(PHASES, times, times[1:], strict=False)}

    def products(self) -> dict[str, float]:
        """Milliseconds of the first layer's three products."""
        layer = self.model[0]  # type: ignore[index]
        weight = layer.values if hasattr(layer, "values") else layer.weight
        x = self._x.detach()
        layer.requires_grad_(False)
        spent = [self._spent(lambda: layer(x))]
        for leaf in (x, weight):
            leaf.requires_grad_()
            y = layer(x)
            gradient = torch.ones_like(y)
            spent.append(self._spent(lambda: torch.autograd.grad(y, leaf, gradient)))  # noqa: B023
            leaf.requires_grad_(False)
        layer.requires_grad_()
        return dict(zip(PRODUCTS, spent, strict=True))

    def _spent(self, call: Callable[[], Any]) -> float:
        start = self._clock()
        call()
        return (self._clock() - start) * 1e3


def block(sparsity: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand(parameter.shape) >= sparsity
    return model


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def measure(tokens: int, sparsity: float, rounds: int, clock: Clock) -> Row:
    dense = block(sparsity)
    sparse = sparse_training(copy.deepcopy(dense))
    x = torch.randn(tokens, WIDTH)
    contestants = [Contestant(model, x, clock) for model in (dense, sparse)]
    for _ in range(WARM_UP):
        contestants[1].step()
    contestants[0].step()
    steps: list[list[dict[str, float]]] = [[], []]
    products: list[list[dict[str, float]]] = [[], []]
    for _ in range(rounds):
        for i, contestant in enumerate(contestants):
            steps[i].append(contestant.step())
    for _ in range(rounds):
        for i, contestant in enumerate(contestants):
            products[i].append(contestant.products())
    sums = [[sum(step.values()) for step in of_one] for of_one in steps]
    shares = []
    for of_one in steps:
        phases = medians(of_one)
        shares.append({p: round(t / sum(phases.values()), 3) for p, t in phases.items()})
    dense_products, sparse_products = (
        {p: round(t, 2) for p, t in medians(r).items()} for r in products
    )
    return Row(
        tokens=tokens,
        sparsity=sparsity,
        dense_ms=round(statistics.median(sums[0]), 2),
        sparse_ms=round(statistics.median(sums[1]), 2),
        times_dense=round(statistics.median(a / b for a, b in zip(*sums, strict=True)), 2),
        dense_shares=shares[0],
        sparse_shares=shares[1],
        dense_products_ms=dense_products,
        sparse_products_ms=sparse_products,
    )


def show(row: Row) -> None:
    def percent(shares: dict[str, float]) -> str:
        return " / ".join(f"{share:.0%}" for share in shares.values())

    products = "; ".join(
        f"{p} {row.dense_products_ms[p]:.1f} -> {row.sparse_products_ms[p]:.1f}" for p in PRODUCTS
    )
    print(
        f"{row.tokens:5d} tokens {row.sparsity:4.0%}: {row.times_dense:.2f} x dense "
        f"({row.dense_ms:.1f} -> {row.sparse_ms:.1f} ms)\n"
        f"    forward / backward / optimizer: dense {percent(row.dense_shares)}, "
        f"sparse {percent(row.sparse_shares)}\n    {products}",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=None, help="default 11, quick 5")
    parser.add_argument("--quick", action="store_true", help="256 tokens, fewer rounds")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--check", action="store_true", help="exit 1 below the floor (one thread)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    rounds = args.rounds or (5 if args.quick else 11)
    rows = []
    for tokens in TOKENS[:1] if args.quick else TOKENS:
        for sparsity in SPARSITIES:
            rows.append(measure(tokens, sparsity, rounds, clock))
            if not args.json:
                show(rows[-1])
    if args.json:
        facts: dict[str, Any] = {"isa": kernels.isa(), "threads": args.threads, "rounds": rounds}
        print(json.dumps({**facts, "rows": [dataclasses.asdict(row) for row in rows]}, indent=2))
    slow = [r for r in rows if r.sparsity == 0.9 and r.times_dense < FLOOR]
    if args.check and args.threads == 1 and slow:
        print(f"below {FLOOR} times dense: {slow}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
