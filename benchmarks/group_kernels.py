"""Kernel groups (SparseByteNN) against dense torch, in one process: where few zeros already pay.

    python benchmarks/group_kernels.py [--quick] [--json] [--threads N] [--check] [--only PART]

Parts: the 1x1 layers of MobileNetV1 at 224 x 224 and their sum, the 3x3 layers of ResNet-50,
depthwise layers whose kernels keep 4 of 9 taps, and MobileNetV1 as a whole, compiled dense and
compiled sparse. Weights are normal numbers, pruned by `build_masks` with `KernelGroup` or
`KernelPattern`; no activation is fused on either side of a layer.

As in benchmarks/spmm.py: calls take turns, round by round, each with an untimed call first; ratios
are taken in every round, and their medians printed, beside what the multiply-adds of the non-zeros
would allow at the ceiling measured in the same process. Rounds are spread over several sweeps; the
kernel's variant is chosen in the first sweep, in rounds of its own. Dense is the fastest of torch's
calls. One thread is timed by its CPU time, several by the wall clock.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import aerogel
from aerogel import kernels
from aerogel.models import create_model
from aerogel.pruning import GroupKernelConfig, group_kernel_prune
from aerogel.sparsity import KernelGroup, KernelPattern, build_masks
from aerogel.train.allocator import keep_freed_memory
from spmm import Call, Timer

# (outputs, inputs, plane side, how often): every 1x1 layer of MobileNetV1 at 224 x 224.
POINTWISE = (
    (64, 32, 112, 1),
    (128, 64, 56, 1),
    (128, 128, 56, 1),
    (256, 128, 28, 1),
    (256, 256, 28, 1),
    (512, 256, 14, 1),
    (512, 512, 14, 5),
    (1024, 512, 7, 1),
    (1024, 1024, 7, 1),
)
# (channels in and out, plane side): the 3x3 layers of ResNet-50 at 224 x 224, stride 1.
SPATIAL = ((64, 56), (128, 28), (256, 14), (512, 7))
# (channels, plane side): depthwise layers of MobileNetV1 at 224 x 224, stride 1.
DEPTHWISE = ((128, 56), (256, 28), (512, 14), (1024, 7))
PATTERNS = tuple(itertools.product((0.3, 0.5, 0.7), (4, 8)))
QUICK_PATTERNS = ((0.3, 4), (0.5, 4))
# What one thread must reach, in times the fastest dense call.
POINTWISE_FLOORS = {(0.3, 4): 1.0, (0.5, 4): 1.3}
SPATIAL_FLOORS = {(0.5, 4): 1.1}
NETWORK_FLOORS = {(0.3, 4): 1.0}


@dataclass(frozen=True)
class Row:
    """One layer at one sparsity; times in microseconds."""

    part: str
    layer: str
    sparsity: float
    group: int
    count: int
    dense: str
    dense_us: float
    sparse_us: float
    times_dense: float
    gflops: float
    fma_share: float
    variant: tuple[int, ...]


class Contest:
    """A layer's calls and their times, gathered sweep by sweep."""

    def __init__(self, weight: Tensor, side: int, sparsity: float, group: int, count: int) -> None:
        rows, inputs, kernel = weight.shape[0], weight.shape[1], weight.shape[2]
        self.part = "1x1" if kernel == 1 else "3x3"
        self.layer = f"{inputs:4d} -> {rows:4d} @ {side}x{side}"
        self.sparsity, self.group, self.count = sparsity, group, count
        mask = build_masks({"weight": weight}, 1.0 - sparsity, KernelGroup(group))["weight"]
        weight = weight * mask
        x, bias = torch.randn(1, inputs, side, side), torch.randn(rows)
        packed = kernels.BlockRowWeight.pack(weight.flatten(1), 4)
        self.dense = dense_calls(x, weight, bias)
        self.sparse = sparse_calls(x, packed, bias, kernel)
        self.operations = 2 * packed.values.numel() * side * side
        self.variant: tuple[int, ...] | None = None
        self.times: dict[str, list[float]] = {name: [] for name in (*self.dense, "sparse")}

    def sweep(self, timer: Timer, rounds: int) -> None:
        """More rounds; the first sweep chooses the variant."""
        if self.variant is None:
            tuning = timer.rounds(self.sparse, max(3, rounds))
            self.variant = min(tuning, key=lambda v: statistics.median(tuning[v]))
        calls = {**self.dense, "sparse": self.sparse[self.variant]}
        for name, seconds in timer.rounds(calls, rounds).items():
            self.times[name] += seconds

    @property
    def fastest_dense(self) -> str:
        """Name of torch's fastest call."""
        return min(self.dense, key=lambda name: statistics.median(self.times[name]))

    def row(self, roof: kernels.Roofline) -> Row:
        """What was found."""
        assert self.variant is not None
        dense, sparse = self.times[self.fastest_dense], self.times["sparse"]
        gflops = 1e-9 * self.operations / statistics.median(sparse)
        return Row(
            part=self.part,
            layer=self.layer,
            sparsity=self.sparsity,
            group=self.group,
            count=self.count,
            dense=self.fastest_dense,
            dense_us=1e6 * statistics.median(dense),
            sparse_us=1e6 * statistics.median(sparse),
            times_dense=statistics.median(d / s for d, s in zip(dense, sparse, strict=True)),
            gflops=gflops,
            fma_share=gflops / roof.fma_gflops,
            variant=self.variant,
        )


def dense_calls(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Call]:
    """Every way torch has."""
    padding = weight.shape[2] // 2
    nhwc, nhwc_weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    calls: dict[str, Call] = {
        "conv2d": lambda: F.conv2d(x, weight, bias, padding=padding),
        "conv2d nhwc": lambda: F.conv2d(nhwc, nhwc_weight, bias, padding=padding),
    }
    if padding == 0:
        matrix, planes = weight.flatten(1), x.flatten(2)[0]
        column = bias[:, None]
        calls["addmm"] = lambda: torch.addmm(column, matrix, planes)
    return calls


def sparse_calls(
    x: Tensor, packed: kernels.BlockRowWeight, bias: Tensor, kernel: int
) -> dict[tuple[int, ...], Call]:
    """The packed kernel's variants."""
    columns = x.shape[2] * x.shape[3]

    def call(variant: kernels.SpmmVariant) -> Call:
        own = packed.without_cache()
        if kernel == 1:
            return lambda: kernels.spmm(x, own, bias, layout="channels", variant=variant)
        return lambda: kernels.sparse_conv2d(
            x, own, bias, kernel_size=kernel, padding=kernel // 2, variant=variant
        )

    if kernel == 1:
        variants = kernels.spmm_variants(packed, columns)
    else:
        variants = kernels.sparse_conv_variants(packed, columns)
    return {tuple(variant): call(variant) for variant in variants}


def contests_of(patterns: tuple[tuple[float, int], ...], only: str | None) -> Iterator[Contest]:
    """The layers of the parts wanted."""
    for pattern in patterns:
        if only in (None, "1x1"):
            for rows, inputs, side, count in POINTWISE:
                yield Contest(torch.randn(rows, inputs, 1, 1), side, *pattern, count)
        if only in (None, "3x3"):
            for channels, side in SPATIAL:
                yield Contest(torch.randn(channels, channels, 3, 3), side, *pattern, 1)


def sums(contests: list[Contest], roof: kernels.Roofline) -> list[dict[str, Any]]:
    """1x1 layers together, as often as the network has them; 3x3 layers one by one."""
    out = []
    for pattern in dict.fromkeys((c.sparsity, c.group) for c in contests):
        chosen = [c for c in contests if (c.sparsity, c.group) == pattern]
        pointwise = [c for c in chosen if c.part == "1x1"]
        if pointwise:
            out.append(_sum("sum of 1x1", pattern, pointwise, POINTWISE_FLOORS, roof))
        for c in chosen:
            if c.part == "3x3":
                out.append(_sum(f"3x3 {c.layer}", pattern, [c], SPATIAL_FLOORS, roof))
    return out


def _sum(
    name: str,
    pattern: tuple[float, int],
    contests: list[Contest],
    floors: dict[tuple[float, int], float],
    roof: kernels.Roofline,
) -> dict[str, Any]:
    rounds = range(len(contests[0].times["sparse"]))
    dense = [sum(c.count * c.times[c.fastest_dense][i] for c in contests) for i in rounds]
    ours = [sum(c.count * c.times["sparse"][i] for c in contests) for i in rounds]
    ratio = statistics.median(d / s for d, s in zip(dense, ours, strict=True))
    least = 1e-9 * sum(c.count * c.operations for c in contests) / roof.fma_gflops
    return _entry(name, pattern, ratio, floors, statistics.median(dense) / least)


def _entry(
    name: str,
    pattern: tuple[float, int],
    ratio: float,
    floors: dict[tuple[float, int], float],
    limit: float | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "sparsity": pattern[0],
        "group": pattern[1],
        "times_dense": ratio,
        "limit": limit,
        "floor": floors.get(pattern),
    }


def depthwise_entries(rounds: int, group: int = 4) -> list[dict[str, Any]]:
    """Skipping taps (a sparse convolution) against computing all of them, both inside a plan."""
    out = []
    for channels, side in DEPTHWISE:
        x, pattern = torch.randn(1, channels, side, side), KernelPattern(group=group)
        weight = torch.randn(channels, 1, 3, 3)
        weight *= build_masks({"weight": weight}, None, pattern)["weight"]
        packed = kernels.BlockRowWeight.pack(weight.flatten(1), 1)
        plans = {"all": depthwise_plan(x, weight, None, None)}
        for variant in kernels.sparse_conv_variants(packed, side * side, channels, 1):
            plans[str(tuple(variant))] = depthwise_plan(x, weight, packed, variant)
        times: dict[str, list[float]] = {name: [] for name in plans}
        for _ in range(rounds):
            for name, plan in plans.items():
                steps = plan.profile([x], repeats=1)
                times[name].append(sum(s for step, s in steps if step == "layer"))
        every = times.pop("all")
        best = min(times.values(), key=statistics.median)
        ratio = statistics.median(d / s for d, s in zip(every, best, strict=True))
        name = f"depthwise {channels} @ {side}x{side}"
        out.append(_entry(name, (1.0 - pattern.fixed_density, group), ratio, {}))
    return out


def depthwise_plan(
    x: Tensor,
    weight: Tensor,
    packed: kernels.BlockRowWeight | None,
    variant: kernels.SpmmVariant | None,
) -> kernels.Plan:
    """One depthwise layer: dense, or packed without zeros."""
    builder = kernels.PlanBuilder(1, 1)
    value = builder.input(tuple(x.shape[1:]))
    if packed is None:
        y = builder.conv2d(value, weight, None, 1, 1, 1, x.shape[1], name="layer")
    else:
        y = builder.sparse_conv2d(
            value,
            packed.without_cache(),
            kernel_size=3,
            padding=1,
            groups=x.shape[1],
            variant=variant,
            name="layer",
        )
    builder.output(y)
    return builder.build()


def network_entries(
    patterns: tuple[tuple[float, int], ...], threads: int, rounds: int
) -> list[dict[str, Any]]:
    """MobileNetV1 at 224, batch 1: compiled with kernel groups against compiled dense."""
    image = torch.randn(1, 3, 224, 224)
    dense = create_model("mobilenet_v1").eval()
    compiled = {None: aerogel.compile(dense, (image,), threads=threads)}
    for pattern in patterns:
        sparse = copy.deepcopy(dense)
        config = GroupKernelConfig(group=pattern[1], sparsity=pattern[0], rearrange=False)
        group_kernel_prune(sparse, config)
        compiled[pattern] = aerogel.compile(sparse, (image,), threads=threads)
    calls: dict[Any, Call] = {key: (lambda m=m: m(image)) for key, m in compiled.items()}
    times = Timer(threads, 1e-3).rounds(calls, rounds)
    out = []
    for pattern in patterns:
        pairs = zip(times[None], times[pattern], strict=True)
        ratio = statistics.median(d / s for d, s in pairs)
        out.append(_entry("mobilenet_v1, whole", pattern, ratio, NETWORK_FLOORS))
    return out


HEADER = (
    f"{'':3s} {'layer':22s} {'zeros':>5s} {'G':>2s} {'dense us':>20s} {'ours us':>8s} "
    f"{'x dense':>7s} {'GFLOP/s':>7s} {'% FMA':>5s}  V G K T pack C"
)


def line(row: Row) -> str:
    return (
        f"{row.part:3s} {row.layer:22s} {row.sparsity:5.0%} {row.group:>2d} {row.dense:>12s}"
        f"{row.dense_us:8.0f} {row.sparse_us:8.0f} {row.times_dense:7.2f} {row.gflops:7.1f} "
        f"{row.fma_share:5.0%}  " + " ".join(str(int(v)) for v in row.variant)
    )


def print_table(rows: list[Row], found: list[dict[str, Any]], roof: kernels.Roofline) -> None:
    print(f"torch {torch.__version__}, {roof.isa}, {roof.threads} thread(s)")
    print(f"ceiling: {roof.fma_gflops:.0f} GFLOP/s\n")
    if rows:
        print("\n".join([HEADER, *map(line, rows), ""]))
    print("times dense")
    for entry in found:
        floor = f"  (floor {entry['floor']})" if entry["floor"] else ""
        limit = f" of {entry['limit']:.2f} at the ceiling" if entry["limit"] else ""
        print(
            f"{entry['name']:28s} {entry['sparsity']:.0%} G={entry['group']}: "
            f"{entry['times_dense']:.2f}{limit}{floor}"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="a sweep")
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="G = 4 at 30 and 50 percent only")
    parser.add_argument("--only", choices=("1x1", "3x3", "depthwise", "network"), help="one part")
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
        contests = list(contests_of(patterns, options.only))
        for _ in range(options.sweeps):
            for contest in contests:
                contest.sweep(timer, options.rounds)
    rows = [contest.row(roof) for contest in contests]
    found, rounds = sums(contests, roof), options.sweeps * options.rounds
    if options.only in (None, "depthwise"):
        found += depthwise_entries(rounds)
    if options.only in (None, "network"):
        found += network_entries(patterns, options.threads, rounds)
    if options.json:
        result = {
            "torch": torch.__version__,
            "threads": options.threads,
            "roofline": dataclasses.asdict(roof),
            "rows": [dataclasses.asdict(row) for row in rows],
            "results": found,
        }
        print(json.dumps(result, indent=2))
    else:
        print_table(rows, found, roof)
    missed = [e for e in found if e["floor"] and e["times_dense"] < e["floor"]]
    below = missed if options.threads == 1 else []
    for entry in below:
        name = f"{entry['name']} {entry['sparsity']:.0%} G={entry['group']}"
        print(f"below its floor: {name} {entry['times_dense']:.2f}", file=sys.stderr)
    return 1 if below and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
