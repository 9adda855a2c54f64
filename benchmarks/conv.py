"""Sparse 3x3 convolution against torch, in one process: the 3x3 layers of ResNet-50.

    python benchmarks/conv.py [--quick] [--json] [--threads N] [--check]

As benchmarks/spmm.py: `F.conv2d` and the packed kernel take turns, round by round, each with an
untimed call first; a ratio is taken in every round, and the median of the ratios is printed, beside
the ratio of the two shortest times. The rounds are spread over several sweeps of all layers, and
the kernel's variant is chosen in the first sweep, in rounds of its own. One thread is timed by its
CPU time, several by the wall clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel import kernels
from aerogel.train.allocator import keep_freed_memory
from spmm import Call, Timer

# (channels in and out, plane side): the 3x3 layers of ResNet-50 at 224 x 224, stride 1.
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
GEOMETRY = kernels.ConvGeometry.of(3, padding=1)
PATTERNS = tuple(itertools.product((0.8, 0.9, 0.95), (1, 4)))
QUICK_PATTERNS = ((0.9, 1), (0.9, 4))
# What the geometric mean over the layers must reach on one thread.
FLOORS = {(0.9, 1): 4.5, (0.9, 4): 5.5}


@dataclass(frozen=True)
class Row:
    """One layer at one sparsity; times in microseconds."""

    layer: str
    sparsity: float
    block: int
    dense_us: float
    sparse_us: float
    times_dense: float
    times_dense_best: float
    gflops: float
    fma_share: float
    variant: tuple[int, ...]


class Contest:
    """A layer's calls and their times, gathered sweep by sweep."""

    def __init__(self, channels: int, side: int, sparsity: float, block: int) -> None:
        self.layer = f"{channels:3d} @ {side}x{side}"
        self.sparsity, self.block = sparsity, block
        x, bias = torch.randn(1, channels, side, side), torch.randn(channels)
        weight = random_kernel(channels, sparsity, block)
        packed = kernels.BlockRowWeight.pack(weight.flatten(1), block)
        self.dense: Call = lambda: F.conv2d(x, weight, bias, padding=1)
        self.sparse = {
            tuple(variant): call_of(x, packed, bias, variant)
            for variant in kernels.sparse_conv_variants(packed, GEOMETRY, (side, side))
        }
        self.operations = 2 * packed.values.numel() * side * side
        self.variant: tuple[int, ...] | None = None
        self.times: dict[str, list[float]] = {"dense": [], "sparse": []}

    def sweep(self, timer: Timer, rounds: int) -> None:
        if self.variant is None:
            tuning = timer.rounds(self.sparse, max(3, rounds))
            self.variant = min(tuning, key=lambda v: statistics.median(tuning[v]))
        calls = {"dense": self.dense, "sparse": self.sparse[self.variant]}
        for name, seconds in timer.rounds(calls, rounds).items():
            self.times[name] += seconds

    def row(self, roof: kernels.Roofline) -> Row:
        assert self.variant is not None
        dense, sparse = self.times["dense"], self.times["sparse"]
        seconds = statistics.median(sparse)
        gflops = 1e-9 * self.operations / seconds
        return Row(
            layer=self.layer,
            sparsity=self.sparsity,
            block=self.block,
            dense_us=1e6 * statistics.median(dense),
            sparse_us=1e6 * seconds,
            times_dense=statistics.median(d / s for d, s in zip(dense, sparse, strict=True)),
            times_dense_best=min(dense) / min(sparse),
            gflops=gflops,
            fma_share=gflops / roof.fma_gflops,
            variant=self.variant,
        )


def random_kernel(channels: int, sparsity: float, block: int) -> Tensor:
    keep = torch.rand(channels // block, channels, 3, 3) >= sparsity
    return torch.randn(channels, channels, 3, 3) * keep.repeat_interleave(block, 0)


def call_of(
    x: Tensor, packed: kernels.BlockRowWeight, bias: Tensor, variant: kernels.SpmmVariant
) -> Call:
    own = packed.without_cache()
    return lambda: kernels.sparse_conv2d(x, own, bias, kernel_size=3, padding=1, variant=variant)


HEADER = (
    f"{'layer':12s} {'zeros':>5s} {'block':>5s} {'conv2d us':>9s} {'ours us':>8s} {'x dense':>7s} "
    f"{'x best':>6s} {'GFLOP/s':>7s} {'% FMA':>5s}  V G K T pack C"
)


def line(row: Row) -> str:
    return (
        f"{row.layer:12s} {row.sparsity:5.0%} {row.block:>3d}x1 {row.dense_us:9.0f} "
        f"{row.sparse_us:8.0f} {row.times_dense:7.2f} {row.times_dense_best:6.2f} "
        f"{row.gflops:7.1f} {row.fma_share:5.0%}  " + " ".join(str(int(v)) for v in row.variant)
    )


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """Geometric means by pattern, beside their floors."""
    out = []
    for pattern in dict.fromkeys((r.sparsity, r.block) for r in rows):
        chosen = [r for r in rows if (r.sparsity, r.block) == pattern]
        out.append(
            {
                "sparsity": pattern[0],
                "block": pattern[1],
                "times_dense": statistics.geometric_mean(r.times_dense for r in chosen),
                "times_dense_best": statistics.geometric_mean(r.times_dense_best for r in chosen),
                "floor": FLOORS.get(pattern),
            }
        )
    return out


def print_table(rows: list[Row], means: list[dict[str, Any]], roof: kernels.Roofline) -> None:
    print(f"torch {torch.__version__}, {roof.isa}, {roof.threads} thread(s)")
    print(f"ceiling: {roof.fma_gflops:.0f} GFLOP/s\n\n{HEADER}")
    print("\n".join(line(row) for row in rows))
    print("\ngeometric means")
    for m in means:
        floor = f"  (floor {m['floor']})" if m["floor"] else ""
        print(
            f"{m['sparsity']:.0%} {m['block']}x1: {m['times_dense']:.2f} x conv2d, "
            f"{m['times_dense_best']:.2f} of the shortest times{floor}"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="a sweep")
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="90 percent only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="exit 1 below a floor (one thread)")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    timer = Timer(options.threads, 1e-3)
    roof = kernels.roofline(options.threads)
    patterns = QUICK_PATTERNS if options.quick else PATTERNS
    with torch.inference_mode():
        contests = [Contest(*layer, *pattern) for pattern in patterns for layer in LAYERS]
        for _ in range(options.sweeps):
            for contest in contests:
                contest.sweep(timer, options.rounds)
    rows = [contest.row(roof) for contest in contests]
    means = summary(rows)
    if options.json:
        result = {
            "torch": torch.__version__,
            "threads": options.threads,
            "roofline": dataclasses.asdict(roof),
            "rows": [dataclasses.asdict(row) for row in rows],
            "geometric_means": means,
        }
        print(json.dumps(result, indent=2))
    else:
        print_table(rows, means, roof)
    missed = [m for m in means if m["floor"] and m["times_dense"] < m["floor"]]
    below = missed if options.threads == 1 else []
    for m in below:
        name = f"{m['sparsity']:.0%} {m['block']}x1"
        print(f"below its floor: {name} {m['times_dense']:.2f}", file=sys.stderr)
    return 1 if below and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
