"""Training steps on stored weights only against the same steps dense in torch.

    python benchmarks/sparse_training.py [--quick] [--json] [--threads N] [--check] [--save]

A step is forward, backward and AdamW of a feed-forward block 768-3072-768 with GELU, or of a whole
block of ViT-B (12 heads, sequences of 256 tokens), and its input asks for a gradient, as inside a
network. Dense and sparse steps take turns, phase by phase timed; see harness.py. The sparse layers
find their variants in untimed steps first.

Beside every block, the three products of its first feed-forward layer alone: milliseconds dense and
sparse. The limit is what the multiply-adds that are left (three products a layer; attention is
dense) would take at the measured peak.

The last rows are what masks add to a step that is computed dense: to two MLPs' with RigL, 100 steps
and one change of masks at a time, and to ViT-tiny's with N:M masks chosen anew at every step.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harness
from aerogel import models
from aerogel.pruning import SRSTE, STE, RigL
from aerogel.sparsity.controlled import ControlledTrainer
from aerogel.train import sparse_training
from harness import Column, Figure, Findings, Setup, ratio

WIDTH, HIDDEN, HEADS, SEQUENCE = 768, 3072, 12, 256
TOKENS = (256, 1024)
SPARSITIES = (0.8, 0.9, 0.95)
WARM_UP = 30  # sparse steps: more than variants times tries
PHASES = ("forward", "backward", "optimizer")
PRODUCTS = ("output", "input gradient", "weight gradient")
FLOORS = {0.9: 2.0}  # times dense, by zeros
UPDATE_EVERY = 100  # steps between the changes of RigL's masks

Clock = Callable[[], float]

COLUMNS = (
    Column("block", "block"),
    Column("tokens", "tokens"),
    Column("sparsity", "zeros", ".0%"),
    Column("dense_ms", "dense ms", ".1f"),
    Column("sparse_ms", "ours ms", ".1f"),
    Column("times_dense", "x dense", ".2f"),
    Column("limit", "limit", ".1f"),
    Column("overhead", "masks add", ".1%"),
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
        """Milliseconds of the first feed-forward layer's three products."""
        layer = self.model.fc1
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


class FeedForward(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, WIDTH) -> the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class VitBlock(FeedForward):
    """Attention and feed-forward, each behind a layer norm and with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, WIDTH) -> the same."""
        x = x + self._attend(self.norm1(x))
        return x + super().forward(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, HEADS, -1))  # (batch, sequence, 3, heads, head_dim)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.proj(mixed.transpose(1, 2).flatten(2))


BLOCKS = {"feed-forward": FeedForward, "ViT-B": VitBlock}


def block(kind: str, sparsity: float) -> nn.Module:
    torch.manual_seed(0)
    model = BLOCKS[kind]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand(parameter.shape) >= sparsity
    return model


def operations(model: nn.Module, x: Tensor) -> int:
    """Of a step: three products of every stored weight, and the dense ones of attention."""
    stored = sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1)
    linear = 3 * 2 * stored * x.shape[0] * x.shape[1]
    if not isinstance(model, VitBlock):
        return linear
    # Forward two products of sequence x sequence x WIDTH, backward twice as many.
    return linear + 3 * 2 * 2 * x.shape[0] * x.shape[1] ** 2 * WIDTH


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def measure_block(kind: str, tokens: int, sparsity: float, setup: Setup) -> dict[str, Any]:
    """A row: the whole step, its phases, and one layer's products; milliseconds."""
    rounds, clock = setup.rounds * setup.sweeps, setup.timer.clock
    dense = block(kind, sparsity)
    sparse = sparse_training(copy.deepcopy(dense))
    x = torch.randn(tokens // SEQUENCE, SEQUENCE, WIDTH)
    least_ms = 1e-6 * operations(dense, x) / setup.roof.fma_gflops
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
    dense_ms = statistics.median(sums["dense"])
    return {
        "block": kind,
        "tokens": tokens,
        "sparsity": sparsity,
        "dense_ms": dense_ms,
        "sparse_ms": statistics.median(sums["ours"]),
        "times_dense": ratio(sums["dense"], sums["ours"]),
        "limit": dense_ms / least_ms,
        **parts,
    }


@dataclass(frozen=True)
class Masking:
    """A network trained under masks but computed dense.

    Attributes:
        name: Of the row.
        build: Makes the network.
        shape: Of its input; the batch first.
        wrap: (network, optimizer) -> what steps instead of the optimizer.
        sparsity: Zeros of the masked weights.
        steps: Timed together.
        most: What masks may add to a step.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    wrap: Callable[[nn.Module, torch.optim.Optimizer], ControlledTrainer]
    sparsity: float
    steps: int
    most: float

    def stepper(self, masked: bool) -> Callable[[], None]:
        """A training step."""
        torch.manual_seed(0)
        model, x = self.build(), torch.randn(self.shape)
        labels = torch.randint(0, 10, self.shape[:1])
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
        end = self.wrap(model, optimizer).step if masked else optimizer.step

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            end()

        return step


def mlp(first: int, second: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(784, first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, 10),
    )


def vit() -> nn.Module:
    return models.create_model("vit_tiny_patch16_224", num_classes=10)


def rigl(model: nn.Module, optimizer: torch.optim.Optimizer) -> ControlledTrainer:
    return RigL(model, optimizer, 0.9, total_steps=10**6, update_every=UPDATE_EVERY)


def nm(kind: type[STE]) -> Callable[[nn.Module, torch.optim.Optimizer], ControlledTrainer]:
    blocks = ["blocks.*"]
    return lambda model, optimizer: kind(model, optimizer, 2, 4, include=blocks)


MASKINGS = (
    Masking("MLP 784-300-100-10, RigL", mlp(300, 100), (128, 784), rigl, 0.9, UPDATE_EVERY, 0.15),
    Masking("MLP 784-512-512-10, RigL", mlp(512, 512), (128, 784), rigl, 0.9, UPDATE_EVERY, 0.15),
    Masking("ViT-tiny, 2:4 STE", vit, (8, 3, 224, 224), nm(STE), 0.5, 1, 0.10),
    Masking("ViT-tiny, 2:4 SR-STE", vit, (8, 3, 224, 224), nm(SRSTE), 0.5, 1, 0.10),
)


def measure_masking(case: Masking, setup: Setup) -> dict[str, Any]:
    """A row: milliseconds of a step without masks and with them, taking turns."""
    contestants = {masked: case.stepper(masked) for masked in (False, True)}
    times: dict[bool, list[float]] = {False: [], True: []}
    for taken in range(setup.rounds * setup.sweeps + 1):
        for masked, step in contestants.items():
            start = setup.timer.clock()
            for _ in range(case.steps):
                step()
            if taken:  # the first is not timed
                times[masked].append((setup.timer.clock() - start) / case.steps)
    return {
        "block": case.name,
        "sparsity": case.sparsity,
        "dense_ms": statistics.median(times[False]) * 1e3,
        "sparse_ms": statistics.median(times[True]) * 1e3,
        "overhead": ratio(times[True], times[False]) - 1.0,
    }


def measure(setup: Setup) -> Findings:
    rows = [
        measure_block(kind, tokens, sparsity, setup)
        for kind in BLOCKS
        for tokens in (TOKENS[:1] if setup.quick else TOKENS)
        for sparsity in SPARSITIES
    ]
    figures = [
        Figure(
            f"training step, {row['block']} block, {row['sparsity']:.0%} zeros, "
            f"{row['tokens']} tokens",
            row["times_dense"],
            "x the dense step in torch",
            FLOORS.get(row["sparsity"]),
            limit=row["limit"],
        )
        for row in rows
    ]
    for case in MASKINGS:
        row = measure_masking(case, setup)
        rows.append(row)
        figures.append(
            Figure(
                f"training step, {row['block']}: what masks add",
                row["overhead"],
                "of the step without",
                most=case.most,
            )
        )
    return Findings(COLUMNS, rows, figures)


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=11, sweeps=1))
