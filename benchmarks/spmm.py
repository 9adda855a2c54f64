"""Sparse product against torch, in one process: 1x1 layers of MobileNetV1 and a BERT linear layer.

    python benchmarks/spmm.py [--quick] [--json] [--threads N] [--check]

For every layer the dense calls of torch (conv2d and mm, or linear), torch's CSR product and the
packed kernel take turns, round by round, each with an untimed call first; a ratio is taken in every
round, and the median of the ratios is printed. The rounds are spread over several sweeps of all
layers, because a shared machine can be slow for seconds. The kernel's variant is chosen in the
first sweep, in rounds of its own. One thread is timed by its CPU time (a busy machine then costs
cache, not seconds), several by the wall clock. Freed memory stays in the process, so that nobody's
output costs page faults.

The two ceilings, multiply-adds and loads from the first cache, are measured in the same process.
Loads counted are those of activations: each stored column reads its row of the panel once.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel import kernels
from aerogel.train.allocator import keep_freed_memory

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
PATTERNS = ((0.9, 1), (0.9, 4), (0.7, 1), (0.7, 4))
# What the geometric mean over the convolutions must reach on one thread, against the fastest dense
# call and against CSR.
DENSE_FLOORS = {(0.9, 1): 4.5, (0.9, 4): 6.5, (0.7, 1): 1.8, (0.7, 4): 2.6}
CSR_FLOOR = 3.5

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One layer at one sparsity; times in microseconds."""

    layer: str
    kind: str
    sparsity: float
    block: int
    dense: str
    dense_us: float
    csr_us: float
    sparse_us: float
    times_dense: float
    times_csr: float
    gflops: float
    fma_share: float
    load_share: float
    variant: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A layer's calls, by name, and the size of its work."""

    layer: str
    kind: str
    dense: dict[str, Call]
    csr: Call
    sparse: dict[tuple[int, ...], Call]
    operations: int
    loaded_bytes: int


class Timer:
    """Times short calls, repeated so that the clock's own cost vanishes."""

    def __init__(self, threads: int, seconds: float) -> None:
        self._clock = time.thread_time if threads == 1 else time.perf_counter
        self._seconds = seconds

    def repeats(self, call: Call) -> int:
        once = min(self.time(call, 1) for _ in range(3))
        return max(1, round(self._seconds / max(once, 1e-7)))

    def time(self, call: Call, repeats: int) -> float:
        begin = self._clock()
        for _ in range(repeats):
            call()
        return (self._clock() - begin) / repeats

    def rounds(self, calls: dict[Any, Call], rounds: int) -> dict[Any, list[float]]:
        """Seconds per call, one entry a round, all calls taking turns."""
        repeats = {name: self.repeats(call) for name, call in calls.items()}
        times: dict[Any, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                call()  # not timed: brings its own data back into the caches
                times[name].append(self.time(call, repeats[name]))
        return times


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
    return Case(
        f"{cols:4d} -> {rows:4d} @ {side}x{side}",
        "conv1x1",
        {"conv2d": lambda: F.conv2d(x, kernel, bias), "mm": lambda: torch.mm(weight, planes)},
        lambda: torch.mm(csr, planes),
        calls_of(x, packed, bias, columns, "channels"),
        2 * packed.values.numel() * columns,
        4 * packed.columns.numel() * columns,
    )


def linear(rows: int, cols: int, tokens: int, sparsity: float, block: int) -> Case:
    weight, bias = random_weight(rows, cols, sparsity, block), torch.randn(rows)
    x = torch.randn(tokens, cols)
    # CSR gets its activations already transposed.
    transposed, csr = x.t().contiguous(), weight.to_sparse_csr()
    packed = kernels.BlockRowWeight.pack(weight, block)
    return Case(
        f"{cols:4d} -> {rows:4d} x {tokens} tokens",
        "linear",
        {"linear": lambda: F.linear(x, weight, bias)},
        lambda: torch.mm(csr, transposed),
        calls_of(x, packed, bias, tokens, "tokens"),
        2 * packed.values.numel() * tokens,
        4 * packed.columns.numel() * tokens,
    )


class Contest:
    """A layer's times, gathered sweep by sweep."""

    def __init__(self, case: Case, sparsity: float, block: int) -> None:
        self.case, self.sparsity, self.block = case, sparsity, block
        self.variant: tuple[int, ...] | None = None
        self.times: dict[str, list[float]] = {name: [] for name in (*case.dense, "csr", "sparse")}

    def sweep(self, timer: Timer, rounds: int) -> None:
        case = self.case
        if self.variant is None:
            tuning = timer.rounds(case.sparse, max(3, rounds))
            self.variant = min(tuning, key=lambda v: statistics.median(tuning[v]))
        calls = {**case.dense, "csr": case.csr, "sparse": case.sparse[self.variant]}
        for name, seconds in timer.rounds(calls, rounds).items():
            self.times[name] += seconds


def row_of(contest: Contest, roof: kernels.Roofline) -> Row:
    case, times = contest.case, contest.times
    assert contest.variant is not None
    dense = min(case.dense, key=lambda name: statistics.median(times[name]))
    seconds = statistics.median(times["sparse"])

    def ratio(name: str) -> float:
        pairs = zip(times[name], times["sparse"], strict=True)
        return statistics.median(other / ours for other, ours in pairs)

    return Row(
        layer=case.layer,
        kind=case.kind,
        sparsity=contest.sparsity,
        block=contest.block,
        dense=dense,
        dense_us=1e6 * statistics.median(times[dense]),
        csr_us=1e6 * statistics.median(times["csr"]),
        sparse_us=1e6 * seconds,
        times_dense=ratio(dense),
        times_csr=ratio("csr"),
        gflops=1e-9 * case.operations / seconds,
        fma_share=1e-9 * case.operations / seconds / roof.fma_gflops,
        load_share=1e-9 * case.loaded_bytes / seconds / roof.load_gbps_l1,
        variant=contest.variant,
    )


HEADER = (
    f"{'layer':28s} {'zeros':>5s} {'block':>5s} {'dense us':>15s} {'CSR us':>8s} {'ours us':>8s} "
    f"{'x dense':>7s} {'x CSR':>6s} {'GFLOP/s':>7s} {'% FMA':>5s} {'% loads':>7s}  V G K T pack"
)


def line(row: Row) -> str:
    return (
        f"{row.layer:28s} {row.sparsity:5.0%} {row.block:>3d}x1 {row.dense:>7s}{row.dense_us:8.0f} "
        f"{row.csr_us:8.0f} {row.sparse_us:8.0f} {row.times_dense:7.2f} {row.times_csr:6.2f} "
        f"{row.gflops:7.1f} {row.fma_share:5.0%} {row.load_share:7.0%}  "
        + " ".join(str(int(v)) for v in row.variant)
    )


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """Geometric means by kind and pattern, beside their floors."""
    out = []
    for kind in ("conv1x1", "linear"):
        for pattern in PATTERNS:
            chosen = [r for r in rows if (r.kind, (r.sparsity, r.block)) == (kind, pattern)]
            if not chosen:
                continue
            entry: dict[str, Any] = {
                "kind": kind,
                "sparsity": pattern[0],
                "block": pattern[1],
                "times_dense": statistics.geometric_mean(r.times_dense for r in chosen),
                "times_csr": statistics.geometric_mean(r.times_csr for r in chosen),
            }
            if kind == "conv1x1":
                entry["floor_dense"] = DENSE_FLOORS[pattern]
                entry["floor_csr"] = CSR_FLOOR
            out.append(entry)
    return out


def misses(means: list[dict[str, Any]]) -> list[str]:
    found = []
    for mean in means:
        for name in ("dense", "csr"):
            floor = mean.get(f"floor_{name}")
            if floor is not None and mean[f"times_{name}"] < floor:
                found.append(
                    f"{mean['sparsity']:.0%} {mean['block']}x1: {mean[f'times_{name}']:.2f} x "
                    f"{name}, floor {floor}"
                )
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=None, help="a sweep; default 7, quick 5")
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="three convolutions, fewer rounds")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="exit 1 below a floor (one thread)")
    return parser.parse_args()


def report(rows: list[Row], roof: kernels.Roofline, rounds: int) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": roof.threads,
        "rounds": rounds,
        "roofline": dataclasses.asdict(roof),
        "rows": [dataclasses.asdict(r) for r in rows],
        "geometric_means": summary(rows),
    }


def print_head(roof: kernels.Roofline, rounds: int) -> None:
    print(f"torch {torch.__version__}, {roof.isa}, {roof.threads} thread(s), {rounds} rounds")
    print(
        f"ceilings: {roof.fma_gflops:.0f} GFLOP/s; loads {roof.load_gbps_l1:.0f} GB/s L1, "
        f"{roof.load_gbps_l2:.0f} L2, {roof.load_gbps_dram:.0f} memory\n\n{HEADER}"
    )


def print_means(means: list[dict[str, Any]]) -> None:
    print("\ngeometric means")
    for m in means:
        floor = f"  (floors {m['floor_dense']}, {m['floor_csr']})" if "floor_dense" in m else ""
        name = f"{m['kind']:8s} {m['sparsity']:.0%} {m['block']}x1"
        print(f"{name}: {m['times_dense']:.2f} x dense, {m['times_csr']:.2f} x CSR{floor}")


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    keep_freed_memory()
    rounds = options.rounds or (5 if options.quick else 7)
    timer = Timer(options.threads, 1e-3)
    roof = kernels.roofline(options.threads)
    if not options.json:
        print_head(roof, options.sweeps * rounds)
    layers: list[tuple[Callable[..., Case], tuple[int, int, int]]]
    if options.quick:
        layers = [(convolution, s) for s in QUICK_CONVOLUTIONS]
    else:
        layers = [(convolution, s) for s in CONVOLUTIONS] + [(linear, s) for s in LINEARS]
    with torch.inference_mode():
        contests = [
            Contest(make(*shape, *pattern), *pattern)
            for pattern, (make, shape) in itertools.product(PATTERNS, layers)
        ]
        for _ in range(options.sweeps):
            for contest in contests:
                contest.sweep(timer, rounds)
    rows = [row_of(contest, roof) for contest in contests]
    if not options.json:
        print("\n".join(line(row) for row in rows))
    means = summary(rows)
    if options.json:
        print(json.dumps(report(rows, roof, options.sweeps * rounds), indent=2))
    else:
        print_means(means)
    below = misses(means) if options.threads == 1 else []
    for miss in below:
        print(f"below its floor: {miss}", file=sys.stderr)
    return 1 if below and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
