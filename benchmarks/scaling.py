"""Cost against work: time over non-zeros, pixels and tokens.

    python benchmarks/scaling.py [--quick] [--json] [--threads N] [--check] [--save]

Three sweeps, each of which takes its turns together (see harness.py): layers from 50 to 99 % zeros;
a MobileNetV1 with 90 % zeros in its 1x1 layers, and layers of it, from 64 to 512 pixels a side; a
linear layer and a feed-forward block of BERT's shape with 90 % zeros from 16 to 4096 tokens.

*Exponent* is the slope of log(time) over log(work): 1 is linear, less means that a fixed cost
shows. *R2* is that of a straight line through the times, *fixed* that line's value at no work, as a
share of the largest time.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import aerogel
import harness
from aerogel import compress, kernels
from conv import random_kernel
from harness import Call, Column, Contest, Figure, Findings, Setup
from spmm import random_weight

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
SIDES = (64, 96, 128, 160, 224, 320, 416, 512)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ZEROS = 0.9
WIDTH, HIDDEN = 768, 3072
# Layers see the image at an eighth of its side.
STRIDE = 8
# A straight line explains the times, and nothing grows faster than the work.
LEAST_R2, LARGEST_EXPONENT = 0.98, 1.1

COLUMNS = (
    Column("what", "what"),
    Column("over", "over"),
    Column("work", "from ... to"),
    Column("times", "us"),
    Column("exponent", "exponent", ".2f"),
    Column("r2", "R2", ".4f"),
    Column("fixed", "fixed", ".1%"),
)


@dataclass(frozen=True)
class Curve:
    """One thing measured at several sizes.

    Attributes:
        what: The layer or network.
        over: What grows.
        calls: Call by amount of work.
    """

    what: str
    over: str
    calls: Mapping[int, Call]


def fastest(variants: Mapping[Any, Call], setup: Setup) -> Call:
    """The best of a kernel's variants, in rounds of their own."""
    tuning = setup.timer.rounds(variants, max(3, setup.rounds))
    return variants[min(tuning, key=lambda v: statistics.median(tuning[v]))]


def pointwise(setup: Setup, channels: int, side: int, sparsity: float) -> tuple[int, Call]:
    """A 1x1 layer: its non-zeros and its call."""
    packed = kernels.BlockRowWeight.pack(random_weight(channels, channels, sparsity, 1), 1)
    x, bias = torch.randn(1, channels, side, side), torch.randn(channels)

    def call(variant: kernels.SpmmVariant) -> Call:
        own = packed.without_cache()
        return lambda: kernels.spmm(x, own, bias, layout="channels", variant=variant)

    variants = kernels.spmm_variants(packed, side * side, "channels")
    return packed.values.numel(), fastest({tuple(v): call(v) for v in variants}, setup)


def spatial(setup: Setup, channels: int, side: int, sparsity: float) -> tuple[int, Call]:
    """A 3x3 layer: its non-zeros and its call."""
    weight = random_kernel(channels, sparsity, 1).flatten(1)
    packed = kernels.BlockRowWeight.pack(weight, 1)
    x, bias = torch.randn(1, channels, side, side), torch.randn(channels)

    def call(variant: kernels.SpmmVariant) -> Call:
        own = packed.without_cache()
        return lambda: kernels.sparse_conv2d(
            x, own, bias, kernel_size=3, padding=1, variant=variant
        )

    geometry = kernels.ConvGeometry.of(3, padding=1)
    variants = kernels.sparse_conv_variants(packed, geometry, (side, side))
    return packed.values.numel(), fastest({tuple(v): call(v) for v in variants}, setup)


def linear(setup: Setup, packed: kernels.BlockRowWeight, tokens: int) -> Call:
    x, bias = torch.randn(tokens, WIDTH), torch.randn(HIDDEN)

    def call(variant: kernels.SpmmVariant) -> Call:
        own = packed.without_cache()
        return lambda: kernels.spmm(x, own, bias, layout="tokens", variant=variant)

    variants = kernels.spmm_variants(packed, tokens, "tokens")
    return fastest({tuple(v): call(v) for v in variants}, setup)


def compiled(model: nn.Module, x: Tensor, threads: int) -> Call:
    run = aerogel.compile(model, (x,), threads=threads)
    return lambda: run(x)


def block() -> nn.Module:
    layers = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
    for layer in layers:
        layer.weight.data *= torch.rand_like(layer.weight) >= ZEROS
    return nn.Sequential(layers[0], nn.GELU(), layers[1]).eval()


def over_nonzeros(setup: Setup) -> list[Curve]:
    kinds: dict[str, tuple[Callable[..., tuple[int, Call]], int, int]] = {
        "1x1, 512 channels @ 14x14": (pointwise, 512, 14),
        "3x3, 128 channels @ 28x28": (spatial, 128, 28),
    }
    sparsities = SPARSITIES[::2] if setup.quick else SPARSITIES
    return [
        Curve(name, "non-zeros", dict(sorted(make(setup, *shape, s) for s in sparsities)))
        for name, (make, *shape) in kinds.items()
    ]


def over_pixels(setup: Setup) -> list[Curve]:
    sides = SIDES[::3] if setup.quick else SIDES
    pair, _ = compress.random_networks("mobilenet_v1", ZEROS)
    network = {
        side**2: compiled(pair.sparse, torch.randn(1, 3, side, side), setup.threads)
        for side in sides
    }
    layers = {
        "1x1, 128 channels": {s**2: pointwise(setup, 128, s // STRIDE, ZEROS)[1] for s in sides},
        "3x3, 128 channels": {s**2: spatial(setup, 128, s // STRIDE, ZEROS)[1] for s in sides},
    }
    return [
        Curve("MobileNetV1", "pixels", network),
        *(Curve(name, "pixels", calls) for name, calls in layers.items()),
    ]


def over_tokens(setup: Setup) -> list[Curve]:
    tokens = TOKENS[::3] if setup.quick else TOKENS
    packed = kernels.BlockRowWeight.pack(random_weight(HIDDEN, WIDTH, ZEROS, 1), 1)
    model = block()
    return [
        Curve("linear 768 -> 3072", "tokens", {n: linear(setup, packed, n) for n in tokens}),
        Curve("feed-forward block", "tokens",
              {n: compiled(model, torch.randn(n, WIDTH), setup.threads) for n in tokens}),
    ]  # fmt: skip


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Exponent, R2 of the straight line, and its value at no work over the largest time."""
    x, y = (torch.tensor(axis, dtype=torch.float64) for axis in zip(*points, strict=True))

    def line(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        slope = ((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum()
        return slope, b.mean() - slope * a.mean()

    exponent, _ = line(x.log(), y.log())
    slope, start = line(x, y)
    residual = (y - slope * x - start).square().sum() / (y - y.mean()).square().sum()
    return float(exponent), float(1 - residual), float(start / y.max())


def row_of(curve: Curve, contest: Contest) -> dict[str, Any]:
    points = [(n, 1e6 * contest.seconds(str(n))) for n in curve.calls]
    exponent, r2, fixed = fit(points)
    return {
        "what": curve.what,
        "over": curve.over,
        "work": f"{points[0][0]:,} ... {points[-1][0]:,}",
        "times": " ".join(f"{us:.0f}" if us >= 10 else f"{us:.1f}" for _, us in points),
        "exponent": exponent,
        "r2": r2,
        "fixed": fixed,
        "points": points,
    }


def measure(setup: Setup) -> Findings:
    with torch.inference_mode():
        curves = [*over_nonzeros(setup), *over_pixels(setup), *over_tokens(setup)]
        contests = [Contest({str(n): call for n, call in c.calls.items()}) for c in curves]
        harness.hold(contests, setup)
    rows = [row_of(*pair) for pair in zip(curves, contests, strict=True)]
    figures = []
    for row in rows:
        name = f"{row['what']}, time over {row['over']}"
        figures.append(Figure(name, row["r2"], "R2 of a straight line", floor=LEAST_R2))
        figures.append(Figure(name, row["exponent"], "exponent", most=LARGEST_EXPONENT))
    plots = [
        {
            "title": f"time over {over}",
            "x": over,
            "y": "microseconds",
            "lines": {row["what"]: row["points"] for row in rows if row["over"] == over},
        }
        for over in dict.fromkeys(row["over"] for row in rows)
    ]
    return Findings(COLUMNS, rows, figures, plots=plots)


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure))
