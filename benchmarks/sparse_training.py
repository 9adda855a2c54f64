"""Training steps on stored weights only against the same steps dense in torch.

    python benchmarks/sparse_training.py [--quick] [--json] [--threads N] [--check] [--save]

A step is forward, backward and AdamW of a feed-forward block 768-3072-768 with GELU, and its input
asks for a gradient, as inside a network. Dense and sparse steps take turns, phase by phase timed;
see harness.py. The sparse layers find their variants in untimed steps first.

Beside every block, the three products of its first layer alone: milliseconds dense and sparse.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import harness
from aerogel.train import sparse_training
from harness import Column, Figure, Findings, Setup, ratio

WIDTH, HIDDEN = 768, 3072
TOKENS = (256, 1024)
SPARSITIES = (0.8, 0.9, 0.95)
WARM_UP = 30  # sparse steps: more than variants times tries
PHASES = ("forward", "backward", "optimizer")
PRODUCTS = ("output", "input gradient", "weight gradient")
FLOORS = {0.9: 2.0}  # times dense, by zeros

Clock = Callable[[], float]

COLUMNS = (
    Column("tokens", "tokens"),
    Column("sparsity", "zeros", ".0%"),
    Column("dense_ms", "dense ms", ".1f"),
    Column("sparse_ms", "ours ms", ".1f"),
    Column("times_dense", "x dense", ".2f"),
    *(Column(part, f"{part}, dense -> ours") for part in (*PHASES, *PRODUCTS)),
)


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


def measure_block(tokens: int, sparsity: float, rounds: int, clock: Clock) -> dict[str, Any]:
    """A row: the whole step, its phases, and the first layer's products; milliseconds."""
    dense = block(sparsity)
    sparse = sparse_training(copy.deepcopy(dense))
    x = torch.randn(tokens, WIDTH)
    contestants = {name: Contestant(model, x, clock)
                   for name, model in (("dense", dense), ("ours", sparse))}  # fmt: skip
    for _ in range(WARM_UP):
        contestants["ours"].step()
    contestants["dense"].step()
    steps: dict[str, list[dict[str, float]]] = {"dense": [], "ours": []}
    products: dict[str, list[dict[str, float]]] = {"dense": [], "ours": []}
    for taken, what in ((steps, Contestant.step), (products, Contestant.products)):
        for _ in range(rounds):
            for name, contestant in contestants.items():
                taken[name].append(what(contestant))
    sums = {name: [sum(step.values()) for step in taken] for name, taken in steps.items()}
    parts: dict[str, Any] = {}
    for taken in (steps, products):
        middle = {name: medians(of_one) for name, of_one in taken.items()}
        for part in middle["ours"]:
            parts[part] = " -> ".join(f"{middle[name][part]:.1f}" for name in ("dense", "ours"))
    return {
        "tokens": tokens,
        "sparsity": sparsity,
        "dense_ms": statistics.median(sums["dense"]),
        "sparse_ms": statistics.median(sums["ours"]),
        "times_dense": ratio(sums["dense"], sums["ours"]),
        **parts,
    }


def measure(setup: Setup) -> Findings:
    rounds = setup.rounds * setup.sweeps
    rows = [
        measure_block(tokens, sparsity, rounds, setup.timer.clock)
        for tokens in (TOKENS[:1] if setup.quick else TOKENS)
        for sparsity in SPARSITIES
    ]
    figures = [
        Figure(
            f"training step, {row['sparsity']:.0%} zeros, {row['tokens']} tokens",
            row["times_dense"],
            "x the dense step in torch",
            FLOORS.get(row["sparsity"]),
        )
        for row in rows
    ]
    return Findings(COLUMNS, rows, figures)


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=11, sweeps=1))
