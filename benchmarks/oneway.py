"""One-way convolutions (a priori compression) against the plain layers they stand for.

    python benchmarks/oneway.py [--quick] [--json] [--threads N] [--check] [--save]

A chain of one-way filters with as many channels between as at either end, against the layer of
`nn.Conv3d` or `nn.Conv2d` with the very kernel that the chain multiplies out to; both in eager
torch, on one map, and one training step of 3-D layers on 20. Calls take turns; see harness.py. The
limit is the ratio of their multiply-adds; a figure above it says that torch runs the plain layer
slowly, as it does small 3x3x3 ones on one thread.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import harness
from aerogel.nn import OneWayConv2d, OneWayConv3d
from harness import Call, Column, Contest, Figure, Findings, Setup

# (axes, kernel, channels, side of the map, maps); several maps are a training step's.
LAYERS = (
    (3, 5, 32, 16, 1),
    (3, 3, 32, 16, 1),
    (3, 3, 16, 16, 1),
    (3, 3, 16, 16, 20),
    (2, 5, 64, 56, 1),
    (2, 3, 64, 56, 1),
)
QUICK = LAYERS[:3]
# What the layers of 32 channels must reach.
FLOORS = {LAYERS[0]: 2.0, LAYERS[1]: 1.2}

COLUMNS = (
    Column("layer", "layer"),
    Column("plain_us", "plain us", ".0f"),
    Column("oneway_us", "one-way us", ".0f"),
    Column("times_plain", "x plain", ".2f"),
    Column("limit", "limit", ".1f"),
)


@dataclass(frozen=True)
class Row:
    """One layer; times in microseconds."""

    layer: str
    plain_us: float
    oneway_us: float
    times_plain: float
    limit: float


def call_of(layer: nn.Module, x: Tensor, training: bool) -> Call:
    if not training:
        return lambda: layer(x)
    wanted = [x.requires_grad_(), *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x).sum(), wanted)


def contest_of(axes: int, kernel: int, channels: int, side: int, maps: int) -> Contest:
    kind = OneWayConv3d if axes == 3 else OneWayConv2d
    layer = kind(channels, channels, kernel)
    x = torch.randn(maps, channels, *[side] * axes)
    training = maps > 1
    layer.requires_grad_(training)
    plain = layer.to_dense().requires_grad_(training)
    return Contest({"plain": call_of(plain, x, training), "ours": call_of(layer, x, training)})


def measure(setup: Setup) -> Findings:
    layers = QUICK if setup.quick else LAYERS
    contests = [contest_of(*layer) for layer in layers]
    harness.hold(contests, setup)
    rows, figures = [], []
    for layer, contest in zip(layers, contests, strict=True):
        axes, kernel, channels, side, maps = layer
        name = f"{'x'.join([str(kernel)] * axes)}, {channels} channels, {side}^{axes}"
        name += f", training, {maps} maps" if maps > 1 else ""
        times, limit = contest.times_faster("plain"), kernel ** (axes - 1) / axes
        microseconds = 1e6 * contest.seconds("plain"), 1e6 * contest.seconds()
        rows.append(Row(name, *microseconds, times, limit))
        # The floors hold for any number of threads.
        floor, threads = FLOORS.get(layer), setup.threads
        figures.append(Figure(name, times, "x plain", floor, threads=threads, limit=limit))
    return Findings(COLUMNS, rows, figures)


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure))
