"""Sparse product against torch: 1x1 layers of MobileNetV1 and a linear layer of BERT.

    python benchmarks/spmm.py [--quick] [--json] [--threads N] [--check] [--save]

The dense calls of torch (conv2d and mm, or linear), torch's CSR product and the packed kernel take
turns; see harness.py. CSR gets the activations of the linear layer already transposed.

Loads counted are those of activations: each stored column reads its row of the panel once. The
limit beside a figure is what multiply-adds or these loads from L1, whichever take longer, allow.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from aerogel import kernels
from harness import Call, Column, Contest, Figure, Findings, Setup

# (outputs, inputs, plane side): MobileNetV1 at 224 x 224 from 56x56x128 to 7x7x1024.
CONVOLUTIONS = (
    (128, 128, 56),
    (256, 128, 28),
    (256, 256, 28),
    (512, 256, 14),
    (512, 512, 14),
    (1024, 512, 7),
    (1024, 1024, 7),
)
QUICK_CONVOLUTIONS = ((128, 128, 56), (512, 512, 14), (1024, 1024, 7))
# (outputs, inputs, tokens): the first feed-forward layer of BERT-base.
LINEARS = ((3072, 768, 16), (3072, 768, 128), (3072, 768, 1024))
PATTERNS = ((0.9, 1), (0.9, 4), (0.8, 1), (0.7, 1), (0.7, 4))
# What the geometric mean over the layers of a kind must reach on one thread, against the fastest
# dense call and (convolutions) against CSR.
DENSE_FLOORS = {(0.9, 1): 5.0, (0.9, 4): 7.0, (0.8, 1): 2.9, (0.7, 1): 1.9, (0.7, 4): 2.6}
DENSE_AIMS = {(0.9, 1): 6.5, (0.9, 4): 9.0, (0.8, 1): 3.7, (0.7, 1): 2.4}
CSR_FLOOR = 3.5

COLUMNS = (
    Column("layer", "layer"),
    Column("sparsity", "zeros", ".0%"),
    Column("block", "block"),
    Column("dense", "dense call"),
    Column("dense_us", "dense us", ".0f"),
    Column("csr_us", "CSR us", ".0f"),
    Column("sparse_us", "ours us", ".0f"),
    Column("times_dense", "x dense", ".2f"),
    Column("times_csr", "x CSR", ".2f"),
    Column("limit", "limit", ".1f"),
    Column("gflops", "GFLOP/s", ".1f"),
    Column("fma_share", "of FMA peak", ".0%"),
    Column("load_share", "of L1 loads", ".0%"),
    Column("variant", "V G K T pack"),
)


@dataclass(frozen=True)
class Row:
    """One layer at one sparsity; times in microseconds."""

    layer: str
    kind: str
    sparsity: float
    block: str
    dense: str
    dense_us: float
    csr_us: float
    sparse_us: float
    times_dense: float
    times_csr: float
    gflops: float
    fma_share: float
    load_share: float
    limit: float
    variant: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A layer's contest, and the size of its work."""

    layer: str
    kind: str
    sparsity: float
    block: int
    dense: tuple[str, ...]
    contest: Contest
    operations: int
    loaded_bytes: int

    def row(self, roof: kernels.Roofline) -> Row:
        contest = self.contest
        dense, seconds = contest.fastest(self.dense), contest.seconds()
        return Row(
            layer=self.layer,
            kind=self.kind,
            sparsity=self.sparsity,
            block=f"{self.block}x1",
            dense=dense,
            dense_us=1e6 * contest.seconds(dense),
            csr_us=1e6 * contest.seconds("csr"),
            sparse_us=1e6 * seconds,
            times_dense=contest.times_faster(dense),
            times_csr=contest.times_faster("csr"),
            gflops=1e-9 * self.operations / seconds,
            fma_share=1e-9 * self.operations / seconds / roof.fma_gflops,
            load_share=1e-9 * self.loaded_bytes / seconds / roof.load_gbps_l1,
            limit=contest.seconds(dense) / self.least_seconds(roof),
            variant=contest.variant,
        )

    def least_seconds(self, roof: kernels.Roofline) -> float:
        """What the busier of the machine's ports needs."""
        multiply = self.operations / roof.fma_gflops
        return 1e-9 * max(multiply, self.loaded_bytes / roof.load_gbps_l1)


def random_weight(rows: int, cols: int, sparsity: float, block: int) -> Tensor:
    keep = torch.rand(rows // block, cols) >= sparsity
    return torch.randn(rows, cols) * keep.repeat_interleave(block, 0)


def calls_of(
    x: Tensor, packed: kernels.BlockRowWeight, bias: Tensor, columns: int, layout: str
) -> dict[tuple[int, ...], Call]:
    def call(variant: kernels.SpmmVariant) -> Call:
        own = packed.without_cache()
        return lambda: kernels.spmm(x, own, bias, layout=layout, variant=variant)

    return {tuple(v): call(v) for v in kernels.spmm_variants(packed, columns, layout)}


def convolution(rows: int, cols: int, side: int, sparsity: float, block: int) -> Case:
    weight, bias = random_weight(rows, cols, sparsity, block), torch.randn(rows)
    x = torch.randn(1, cols, side, side)
    planes, kernel, csr = x.view(cols, -1), weight[:, :, None, None], weight.to_sparse_csr()
    packed = kernels.BlockRowWeight.pack(weight, block)
    columns = side * side
    dense: dict[str, Call] = {
        "conv2d": lambda: F.conv2d(x, kernel, bias),
        "mm": lambda: torch.mm(weight, planes),
    }
    variants = calls_of(x, packed, bias, columns, "channels")
    return Case(
        layer=f"{cols:4d} -> {rows:4d} @ {side}x{side}",
        kind="1x1",
        sparsity=sparsity,
        block=block,
        dense=tuple(dense),
        contest=Contest({**dense, "csr": lambda: torch.mm(csr, planes)}, variants),
        operations=2 * packed.values.numel() * columns,
        loaded_bytes=4 * packed.columns.numel() * columns,
    )


def linear(rows: int, cols: int, tokens: int, sparsity: float, block: int) -> Case:
    weight, bias = random_weight(rows, cols, sparsity, block), torch.randn(rows)
    x = torch.randn(tokens, cols)
    transposed, csr = x.t().contiguous(), weight.to_sparse_csr()
    packed = kernels.BlockRowWeight.pack(weight, block)
    calls: dict[str, Call] = {
        "linear": lambda: F.linear(x, weight, bias),
        "csr": lambda: torch.mm(csr, transposed),
    }
    return Case(
        layer=f"{cols:4d} -> {rows:4d} x {tokens} tokens",
        kind="linear",
        sparsity=sparsity,
        block=block,
        dense=("linear",),
        contest=Contest(calls, calls_of(x, packed, bias, tokens, "tokens")),
        operations=2 * packed.values.numel() * tokens,
        loaded_bytes=4 * packed.columns.numel() * tokens,
    )


def figures(cases: list[Case], rows: list[Row]) -> list[Figure]:
    """Geometric means by kind and pattern, beside their floors."""
    found = []
    groups = dict.fromkeys((case.kind, case.sparsity, case.block) for case in cases)
    for kind, sparsity, block in groups:
        chosen = [
            row for case, row in zip(cases, rows, strict=True)
            if (case.kind, case.sparsity, case.block) == (kind, sparsity, block)
        ]  # fmt: skip
        name = f"{kind}, {sparsity:.0%} zeros in {block}x1, geometric mean"
        dense = statistics.geometric_mean(row.times_dense for row in chosen)
        limit = statistics.geometric_mean(row.limit for row in chosen)
        floor, aim = DENSE_FLOORS.get((sparsity, block)), DENSE_AIMS.get((sparsity, block))
        unit = "x the fastest dense call of torch"
        found.append(Figure(name, dense, unit, floor, aim, limit=limit))
        csr = statistics.geometric_mean(row.times_csr for row in chosen)
        found.append(Figure(name, csr, "x torch CSR", CSR_FLOOR if kind == "1x1" else None))
    return found


def measure(setup: Setup) -> Findings:
    layers: list[tuple[Callable[..., Case], tuple[int, int, int]]]
    if setup.quick:
        layers = [(convolution, s) for s in QUICK_CONVOLUTIONS]
    else:
        layers = [(convolution, s) for s in CONVOLUTIONS] + [(linear, s) for s in LINEARS]
    with torch.inference_mode():
        cases = [
            make(*shape, *pattern) for pattern, (make, shape) in itertools.product(PATTERNS, layers)
        ]
        harness.hold([case.contest for case in cases], setup)
    rows = [case.row(setup.roof) for case in cases]
    return Findings(COLUMNS, rows, figures(cases, rows))


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=7))
