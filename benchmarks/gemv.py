"""Products of one to a few vectors against torch, in one process, weights coming from memory.

    python benchmarks/gemv.py [--quick] [--json] [--threads N] [--check]

Two kernels: sparse weights (`gemv`), and dense weights whose inputs are mostly zero
(`sparse_input_linear`), both with values in float32, bfloat16 and int8, against dense float32 torch
(the faster of `F.linear` and `torch.mm`) and, for sparse weights, torch's CSR. As in
benchmarks/spmm.py the calls take turns, round by round; a ratio is taken in every round, and the
median of the ratios is printed. One thread is timed by its CPU time, several by the wall clock.

A network that decodes reads all its layers before it comes back to the first, so that no weight is
still in a cache. Here every call takes the next of several copies of its weight, together far
larger than the last cache.

The limit printed beside each ratio is that of bytes: what the call must read, at the bandwidth of
memory measured in the same process. The bandwidth is measured again before every sweep.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel import kernels
from aerogel.train.allocator import keep_freed_memory
from harness import Call, Timer

# (outputs, inputs): the second feed-forward layer of a Llama of 7 billion weights.
LAYER = (4096, 11008)
COPIES_BYTES = 192 << 20  # what all copies of a weight take together, at least
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
ZERO_INPUTS = (0.5, 0.9)
TOKENS = 4
# What must be reached on one thread in float32 with one vector: (kernel, zeros) -> x dense.
FLOORS = {("gemv", 0.9): 3.2, ("gemv", 0.95): 6.5, ("sparse input", 0.9): 5.5}


@dataclass(frozen=True)
class Case:
    """One product: our call, the others' by name, and the bytes that ours must read."""

    kernel: str
    zeros: float
    values: str
    tokens: int
    calls: dict[str, Call]
    ours: Call
    nbytes: int


@dataclass(frozen=True)
class Row:
    """One product's result; times in microseconds, ratios of the other's time to ours."""

    kernel: str
    zeros: float
    values: str
    tokens: int
    dense_us: float
    csr_us: float | None
    ours_us: float
    times_dense: float
    limit: float
    times_csr: float | None
    gbps: float
    floor: float | None


def in_turn(calls: list[Call]) -> Call:
    """Each call runs the next of these."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def copies_of(nbytes: int) -> range:
    return range(math.ceil(COPIES_BYTES / nbytes))


def dense_calls(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Call]:
    """torch's ways; the weight alone is far larger than any cache."""
    return {
        "linear": lambda: F.linear(x, weight, bias),
        "mm": lambda: torch.addmm(bias, x, weight.t()),
    }


def sparse_weight_case(
    dense: Tensor, sparsity: float, dtype: torch.dtype, tokens: int, with_csr: bool
) -> Case:
    rows, cols = dense.shape
    kept = dense * (torch.rand(rows, cols) >= sparsity)
    x, bias = torch.randn(tokens, cols), torch.randn(rows)
    calls = dense_calls(x, dense, bias)
    if with_csr:
        csr, columns = kept.to_sparse_csr(), x.t().contiguous()
        calls["csr"] = lambda: torch.mm(csr, columns)
    packed = kernels.BlockRowWeight.pack(kept, 1, dtype=dtype)
    nbytes = kernels.native_gemv_weight(packed).nbytes
    copies = [packed.without_cache() for _ in copies_of(nbytes)]

    for copy in copies:
        kernels.gemv(x, copy, bias)  # makes the native stream

    def call(weight: kernels.BlockRowWeight) -> Call:
        return lambda: kernels.gemv(x, weight, bias)

    return Case(
        "gemv", sparsity, _name(dtype), tokens, calls, in_turn([call(w) for w in copies]), nbytes
    )


def sparse_input_case(dense: Tensor, zeros: float, dtype: torch.dtype, tokens: int) -> Case:
    """Zeros of different tokens are drawn independently: the least that tokens can share."""
    rows, cols = dense.shape
    bias = torch.randn(rows)
    # Every call has its own zeros, so that its rows come from memory.
    inputs = [torch.randn(tokens, cols) * (torch.rand(tokens, cols) >= zeros) for _ in range(32)]
    weight, scales = dense, None
    if dtype is torch.int8:
        weight, scales = kernels.quantize_rows(dense)
    weight_t = weight.t().to(dtype).contiguous()
    active = statistics.mean(float((x != 0).any(0).sum()) for x in inputs)

    def call(x: Tensor) -> Call:
        return lambda: kernels.sparse_input_linear(x, weight_t, bias, scales=scales)

    return Case(
        "sparse input",
        zeros,
        _name(dtype),
        tokens,
        dense_calls(inputs[0], dense, bias),
        in_turn([call(x) for x in inputs]),
        round(active * rows * weight_t.element_size()),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def row_of(case: Case, times: dict[str, list[float]], memory_gbps: float) -> Row:
    dense = min(("linear", "mm"), key=lambda name: statistics.median(times[name]))
    seconds = statistics.median(times["ours"])

    def ratio(name: str) -> float:
        pairs = zip(times[name], times["ours"], strict=True)
        return statistics.median(other / ours for other, ours in pairs)

    dense_seconds = statistics.median(times[dense])
    has_csr = "csr" in times
    floor = None
    if case.values == "float32" and case.tokens == 1:
        floor = FLOORS.get((case.kernel, case.zeros))
    return Row(
        kernel=case.kernel,
        zeros=case.zeros,
        values=case.values,
        tokens=case.tokens,
        dense_us=1e6 * dense_seconds,
        csr_us=1e6 * statistics.median(times["csr"]) if has_csr else None,
        ours_us=1e6 * seconds,
        times_dense=ratio(dense),
        limit=dense_seconds * 1e9 * memory_gbps / case.nbytes,
        times_csr=ratio("csr") if has_csr else None,
        gbps=1e-9 * case.nbytes / seconds,
        floor=floor,
    )


HEADER = (
    f"{'kernel':13s} {'zeros':>5s} {'values':>9s} {'tokens':>6s} {'dense us':>9s} {'CSR us':>7s} "
    f"{'ours us':>8s} {'x dense':>7s} {'x limit':>7s} {'x CSR':>6s} {'GB/s':>5s}"
)


def line(row: Row) -> str:
    csr = f"{row.csr_us:7.0f}" if row.csr_us is not None else f"{'':7s}"
    times_csr = f"{row.times_csr:6.2f}" if row.times_csr is not None else f"{'':6s}"
    floor = "" if row.floor is None else f"  (floor {row.floor})"
    return (
        f"{row.kernel:13s} {row.zeros:5.0%} {row.values:>9s} {row.tokens:6d} {row.dense_us:9.0f} "
        f"{csr} {row.ours_us:8.0f} {row.times_dense:7.2f} {row.limit:7.1f} {times_csr} "
        f"{row.gbps:5.1f}{floor}"
    )


def makers(dense: Tensor, quick: bool) -> list[Callable[[], Case]]:
    """What is measured; made one at a time, since the copies of one case fill much memory."""
    made: list[Callable[[], Case]] = []

    def add(function: Callable[..., Case], *arguments: Any) -> None:
        made.append(lambda: function(dense, *arguments))

    sparsities = (0.9, 0.95) if quick else SPARSITIES
    dtypes = DTYPES[:1] if quick else DTYPES
    for sparsity, dtype in itertools.product(sparsities, dtypes):
        add(sparse_weight_case, sparsity, dtype, 1, dtype is torch.float32)
    for zeros, dtype in itertools.product((0.9,) if quick else ZERO_INPUTS, dtypes):
        add(sparse_input_case, zeros, dtype, 1)
    if not quick:
        add(sparse_weight_case, 0.9, torch.float32, TOKENS, True)
        add(sparse_input_case, 0.9, torch.float32, TOKENS)
    return made


def measured(make: Callable[[], Case], timer: Timer, rounds: int, threads: int) -> Row:
    case = make()
    memory = kernels.roofline(threads, seconds=0.05).load_gbps_dram
    return row_of(case, timer.rounds({**case.calls, "ours": case.ours}, rounds), memory)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="only the rows that have a floor")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="exit 1 below a floor (one thread)")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    keep_freed_memory()
    timer = Timer(options.threads, 1e-3)
    roof = kernels.roofline(options.threads)
    if not options.json:
        print(
            f"torch {torch.__version__}, {roof.isa}, {roof.threads} thread(s), "
            f"{options.rounds} rounds, {LAYER[1]} -> {LAYER[0]}; "
            f"memory {roof.load_gbps_dram:.1f} GB/s\n\n{HEADER}"
        )
    rows = []
    with torch.inference_mode():
        for make in makers(torch.randn(LAYER), options.quick):
            rows.append(measured(make, timer, options.rounds, options.threads))
            if not options.json:
                print(line(rows[-1]), flush=True)
    if options.json:
        report = {
            "torch": torch.__version__,
            "threads": options.threads,
            "rounds": options.rounds,
            "roofline": dataclasses.asdict(roof),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        print(json.dumps(report, indent=2))
    below = [r for r in rows if r.floor is not None and r.times_dense < r.floor]
    for row in below if options.threads == 1 else []:
        print(
            f"below its floor: {row.kernel} at {row.zeros:.0%} zeros, {row.times_dense:.2f} x "
            f"dense, floor {row.floor}",
            file=sys.stderr,
        )
    return 1 if below and options.check and options.threads == 1 else 0


if __name__ == "__main__":
    sys.exit(main())
