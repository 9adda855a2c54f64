"""Kernel groups (SparseByteNN) against dense torch: where few zeros already pay.

    python benchmarks/group_kernels.py [--only PART] [--quick] [--json] [--threads N] [--check]

Parts: the 1x1 layers of MobileNetV1 at 224 x 224 and their sum, the 3x3 layers of ResNet-50,
depthwise layers whose kernels keep 4 of 9 taps, and MobileNetV1 as a whole, compiled dense and
compiled sparse. Weights are normal numbers, pruned by `build_masks` with `KernelGroup` or
`KernelPattern`; no activation is fused on either side of a layer. Dense is the fastest of torch's
calls. How calls take turns: harness.py. The limit of a layer is what the multiply-adds that are
left allow.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import aerogel
import harness
from aerogel import kernels
from aerogel.models import create_model
from aerogel.pruning import GroupKernelConfig, group_kernel_prune
from aerogel.sparsity import KernelGroup, KernelPattern, build_masks
from harness import OURS, Call, Column, Contest, Figure, Findings, Setup, Timer

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
GEOMETRY = kernels.ConvGeometry.of(3, padding=1)
PATTERNS = tuple(itertools.product((0.3, 0.5, 0.7), (4, 8)))
QUICK_PATTERNS = ((0.3, 4), (0.5, 4))
DENSE = "x the fastest dense call of torch"
# What one thread must reach.
POINTWISE_FLOORS = {(0.3, 4): 1.0, (0.5, 4): 1.3}
SPATIAL_FLOORS = {(0.5, 4): 1.1}
NETWORK_FLOORS = {(0.3, 4): 1.0}


COLUMNS = (
    Column("part", "part"),
    Column("layer", "layer"),
    Column("sparsity", "zeros", ".0%"),
    Column("group", "G"),
    Column("dense", "dense call"),
    Column("dense_us", "dense us", ".0f"),
    Column("sparse_us", "ours us", ".0f"),
    Column("times_dense", "x dense", ".2f"),
    Column("gflops", "GFLOP/s", ".1f"),
    Column("fma_share", "of FMA peak", ".0%"),
    Column("variant", "V G K T pack C"),
)


class Case:
    """A layer's contest, and the size of its work; the network has it `count` times."""

    def __init__(self, weight: Tensor, side: int, sparsity: float, group: int, count: int) -> None:
        rows, inputs, kernel = weight.shape[0], weight.shape[1], weight.shape[2]
        self.part = "1x1" if kernel == 1 else "3x3"
        self.layer = f"{inputs:4d} -> {rows:4d} @ {side}x{side}"
        self.pattern, self.count = (sparsity, group), count
        mask = build_masks({"weight": weight}, 1.0 - sparsity, KernelGroup(group))["weight"]
        weight = weight * mask
        x, bias = torch.randn(1, inputs, side, side), torch.randn(rows)
        packed = kernels.BlockRowWeight.pack(weight.flatten(1), 4)
        dense = dense_calls(x, weight, bias)
        self.dense = tuple(dense)
        self.contest = Contest(dense, sparse_calls(x, packed, bias, kernel))
        self.operations = 2 * packed.values.numel() * side * side

    @property
    def dense_times(self) -> list[float]:
        """Of torch's fastest call."""
        return self.contest.times[self.contest.fastest(self.dense)]

    def row(self, roof: kernels.Roofline) -> dict[str, Any]:
        """What was found; times in microseconds."""
        dense = self.contest.fastest(self.dense)
        gflops = 1e-9 * self.operations / self.contest.seconds()
        return {
            "part": self.part,
            "layer": self.layer,
            "sparsity": self.pattern[0],
            "group": self.pattern[1],
            "dense": dense,
            "dense_us": 1e6 * self.contest.seconds(dense),
            "sparse_us": 1e6 * self.contest.seconds(),
            "times_dense": self.contest.times_faster(dense),
            "gflops": gflops,
            "fma_share": gflops / roof.fma_gflops,
            "variant": self.contest.variant,
        }


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
        variants = kernels.sparse_conv_variants(packed, GEOMETRY, x.shape[2:])
    return {tuple(variant): call(variant) for variant in variants}


def cases_of(patterns: tuple[tuple[float, int], ...], only: str | None) -> Iterator[Case]:
    """The layers of the parts wanted."""
    for pattern in patterns:
        if only in (None, "1x1"):
            for rows, inputs, side, count in POINTWISE:
                yield Case(torch.randn(rows, inputs, 1, 1), side, *pattern, count)
        if only in (None, "3x3"):
            for channels, side in SPATIAL:
                yield Case(torch.randn(channels, channels, 3, 3), side, *pattern, 1)


def layer_figures(cases: list[Case], roof: kernels.Roofline) -> Iterator[Figure]:
    """1x1 layers together, as often as the network has them; 3x3 layers one by one."""
    for pattern in dict.fromkeys(case.pattern for case in cases):
        chosen = [case for case in cases if case.pattern == pattern]
        pointwise = [case for case in chosen if case.part == "1x1"]
        if pointwise:
            yield _figure("1x1 layers together", pattern, pointwise, POINTWISE_FLOORS, roof)
        for case in chosen:
            if case.part == "3x3":
                yield _figure(f"3x3, {case.layer.strip()}", pattern, [case], SPATIAL_FLOORS, roof)


def _figure(
    name: str,
    pattern: tuple[float, int],
    cases: list[Case],
    floors: dict[tuple[float, int], float],
    roof: kernels.Roofline,
) -> Figure:
    rounds = range(len(cases[0].dense_times))
    dense = [sum(case.count * case.dense_times[i] for case in cases) for i in rounds]
    ours = [sum(case.count * case.contest.times[OURS][i] for case in cases) for i in rounds]
    least = 1e-9 * sum(case.count * case.operations for case in cases) / roof.fma_gflops
    times, limit = harness.ratio(dense, ours), statistics.median(dense) / least
    return Figure(_name(name, pattern), times, DENSE, floors.get(pattern), limit=limit)


def _name(name: str, pattern: tuple[float, int]) -> str:
    return f"{name}, {pattern[0]:.0%} zeros, G = {pattern[1]}"


def depthwise_figures(rounds: int, group: int = 4) -> Iterator[Figure]:
    """Skipping taps (a sparse convolution) against computing all of them, both inside a plan."""
    for channels, side in DEPTHWISE:
        x, pattern = torch.randn(1, channels, side, side), KernelPattern(group=group)
        weight = torch.randn(channels, 1, 3, 3)
        weight *= build_masks({"weight": weight}, None, pattern)["weight"]
        packed = kernels.BlockRowWeight.pack(weight.flatten(1), 1)
        plans = {"all": depthwise_plan(x, weight, None, None)}
        geometry = GEOMETRY._replace(groups=channels)
        for variant in kernels.sparse_conv_variants(packed, geometry, (side, side), 1):
            plans[str(tuple(variant))] = depthwise_plan(x, weight, packed, variant)
        times: dict[str, list[float]] = {name: [] for name in plans}
        for _ in range(rounds):
            for name, plan in plans.items():
                steps = plan.profile([x], repeats=1)
                times[name].append(sum(s for step, s in steps if step == "layer"))
        every = times.pop("all")
        best = min(times.values(), key=statistics.median)
        ratio = statistics.median(d / s for d, s in zip(every, best, strict=True))
        name = _name(f"depthwise, {channels} @ {side}x{side}", (1.0 - pattern.fixed_density, group))
        yield Figure(name, ratio, "x our dense depthwise kernel")


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


def network_figures(
    patterns: tuple[tuple[float, int], ...], threads: int, rounds: int
) -> Iterator[Figure]:
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
    times = Timer(threads).rounds(calls, rounds)
    for pattern in patterns:
        ratio = harness.ratio(times[None], times[pattern])
        name, floor = _name("mobilenet_v1, batch 1", pattern), NETWORK_FLOORS.get(pattern)
        yield Figure(name, ratio, "x the dense network compiled alike", floor)


def measure(setup: Setup) -> Findings:
    patterns, only = QUICK_PATTERNS if setup.quick else PATTERNS, setup.options.only
    rounds = setup.rounds * setup.sweeps
    with torch.inference_mode():
        cases = list(cases_of(patterns, only))
        harness.hold([case.contest for case in cases], setup)
    figures = list(layer_figures(cases, setup.roof))
    if only in (None, "depthwise"):
        figures += depthwise_figures(rounds)
    if only in (None, "network"):
        figures += network_figures(patterns, setup.threads, rounds)
    return Findings(COLUMNS, [case.row(setup.roof) for case in cases], figures)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=("1x1", "3x3", "depthwise", "network"), help="one part")


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, options=add_options))
