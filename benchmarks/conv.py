"""Sparse 3x3 convolution against torch: the 3x3 layers of ResNet-50.

    python benchmarks/conv.py [--quick] [--json] [--threads N] [--check] [--save]

`F.conv2d` and the packed kernel take turns; see harness.py. Beside the median of the rounds' ratios
stands the ratio of the two shortest times. The limit is what the multiply-adds that are left, or
the loads of their activations from L1, whichever take longer, allow.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from aerogel import kernels
from harness import OURS, Call, Column, Contest, Figure, Findings, Setup

# (channels in and out, plane side): the 3x3 layers of ResNet-50 at 224 x 224, stride 1.
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
GEOMETRY = kernels.ConvGeometry.of(3, padding=1)
PATTERNS = tuple(itertools.product((0.8, 0.9, 0.95), (1, 4)))
QUICK_PATTERNS = ((0.9, 1), (0.9, 4))
# What the geometric mean over the layers must reach on one thread, and where it should be.
FLOORS = {(0.9, 1): 4.5, (0.9, 4): 5.5}
AIMS = {(0.9, 1): 6.0, (0.9, 4): 8.0}

COLUMNS = (
    Column("layer", "layer"),
    Column("sparsity", "zeros", ".0%"),
    Column("block", "block"),
    Column("dense_us", "conv2d us", ".0f"),
    Column("sparse_us", "ours us", ".0f"),
    Column("times_dense", "x conv2d", ".2f"),
    Column("times_dense_best", "x, shortest", ".2f"),
    Column("limit", "limit", ".1f"),
    Column("gflops", "GFLOP/s", ".1f"),
    Column("fma_share", "of FMA peak", ".0%"),
    Column("variant", "V G K T pack C"),
)


@dataclass(frozen=True)
class Row:
    """One layer at one sparsity; times in microseconds."""

    layer: str
    sparsity: float
    block: str
    dense_us: float
    sparse_us: float
    times_dense: float
    times_dense_best: float
    limit: float
    gflops: float
    fma_share: float
    variant: tuple[int, ...]


class Case:
    """A layer's contest, and the size of its work."""

    def __init__(self, channels: int, side: int, sparsity: float, block: int) -> None:
        self.layer = f"{channels:3d} @ {side}x{side}"
        self.sparsity, self.block = sparsity, block
        x, bias = torch.randn(1, channels, side, side), torch.randn(channels)
        weight = random_kernel(channels, sparsity, block)
        packed = kernels.BlockRowWeight.pack(weight.flatten(1), block)
        variants = {
            tuple(variant): call_of(x, packed, bias, variant)
            for variant in kernels.sparse_conv_variants(packed, GEOMETRY, (side, side))
        }
        dense: Call = lambda: F.conv2d(x, weight, bias, padding=1)  # noqa: E731
        self.contest = Contest({"dense": dense}, variants)
        self.operations = 2 * packed.values.numel() * side * side
        self.loaded_bytes = 4 * packed.columns.numel() * side * side

    def row(self, roof: kernels.Roofline) -> Row:
        contest = self.contest
        gflops = 1e-9 * self.operations / contest.seconds()
        multiply, load = self.operations / roof.fma_gflops, self.loaded_bytes / roof.load_gbps_l1
        return Row(
            layer=self.layer,
            sparsity=self.sparsity,
            block=f"{self.block}x1",
            dense_us=1e6 * contest.seconds("dense"),
            sparse_us=1e6 * contest.seconds(),
            times_dense=contest.times_faster("dense"),
            times_dense_best=min(contest.times["dense"]) / min(contest.times[OURS]),
            limit=contest.seconds("dense") / (1e-9 * max(multiply, load)),
            gflops=gflops,
            fma_share=gflops / roof.fma_gflops,
            variant=contest.variant,
        )


def random_kernel(channels: int, sparsity: float, block: int) -> Tensor:
    keep = torch.rand(channels // block, channels, 3, 3) >= sparsity
    return torch.randn(channels, channels, 3, 3) * keep.repeat_interleave(block, 0)


def call_of(
    x: Tensor, packed: kernels.BlockRowWeight, bias: Tensor, variant: kernels.SpmmVariant
) -> Call:
    own = packed.without_cache()
    return lambda: kernels.sparse_conv2d(x, own, bias, kernel_size=3, padding=1, variant=variant)


def figures(patterns: tuple[tuple[float, int], ...], rows: list[Row]) -> list[Figure]:
    """Geometric means by pattern, beside their floors."""
    found = []
    for i, pattern in enumerate(patterns):
        chosen = rows[i * len(LAYERS) : (i + 1) * len(LAYERS)]
        name = f"3x3, {pattern[0]:.0%} zeros in {pattern[1]}x1, geometric mean"
        mean = statistics.geometric_mean(row.times_dense for row in chosen)
        limit = statistics.geometric_mean(row.limit for row in chosen)
        promise = FLOORS.get(pattern), AIMS.get(pattern)
        found.append(Figure(name, mean, "x F.conv2d", *promise, limit=limit))
    return found


def measure(setup: Setup) -> Findings:
    patterns = QUICK_PATTERNS if setup.quick else PATTERNS
    with torch.inference_mode():
        cases = [Case(*layer, *pattern) for pattern in patterns for layer in LAYERS]
        harness.hold([case.contest for case in cases], setup)
    rows = [case.row(setup.roof) for case in cases]
    return Findings(COLUMNS, rows, figures(patterns, rows))


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure))
