"""Products of one to a few vectors against torch, weights coming from memory.

    python benchmarks/gemv.py [--quick] [--json] [--threads N] [--check] [--save]

Two kernels: sparse weights (`gemv`), and dense weights whose inputs are mostly zero
(`sparse_input_linear`), both with values in float32, bfloat16 and int8, against dense float32 torch
(the faster of `F.linear` and `torch.mm`) and, for sparse weights, torch's CSR. Calls take turns;
see harness.py.

A network that decodes reads all its layers before it comes back to the first, so that no weight is
still in a cache. Here every call takes the next of several copies of its weight, together far
larger than the last cache.

The limit is that of bytes: what our call must read, at the bandwidth of memory, which is measured
again before every row.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from aerogel import kernels
from harness import OURS, Call, Column, Contest, Figure, Findings, Setup

# (outputs, inputs): the second feed-forward layer of a Llama of 7 billion weights.
LAYER = (4096, 11008)
COPIES_BYTES = 192 << 20  # what all copies of a weight take together, at least
DTYPES = (torch.float32, torch.bfloat16, torch.int8)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
ZERO_INPUTS = (0.5, 0.9)
TOKENS = 4
# One thread, float32, one vector: (kernel, zeros) -> what must be reached, where it should be.
PROMISES = {
    ("gemv", 0.9): (3.2, 4.5),
    ("gemv", 0.95): (6.5, 9.0),
    ("sparse input", 0.9): (5.5, 8.0),
}

COLUMNS = (
    Column("kernel", "kernel"),
    Column("zeros", "zeros", ".0%"),
    Column("values", "values"),
    Column("tokens", "tokens"),
    Column("dense", "dense call"),
    Column("dense_us", "dense us", ".0f"),
    Column("csr_us", "CSR us", ".0f"),
    Column("ours_us", "ours us", ".0f"),
    Column("times_dense", "x dense", ".2f"),
    Column("limit", "limit", ".1f"),
    Column("times_csr", "x CSR", ".2f"),
    Column("gbps", "GB/s", ".1f"),
    Column("memory_gbps", "memory GB/s", ".1f"),
)


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
    dense: str
    dense_us: float
    csr_us: float | None
    ours_us: float
    times_dense: float
    limit: float
    times_csr: float | None
    gbps: float
    memory_gbps: float


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


def row_of(case: Case, contest: Contest, memory_gbps: float) -> Row:
    dense, seconds = contest.fastest(("linear", "mm")), contest.seconds()
    has_csr = "csr" in contest.times
    return Row(
        kernel=case.kernel,
        zeros=case.zeros,
        values=case.values,
        tokens=case.tokens,
        dense=dense,
        dense_us=1e6 * contest.seconds(dense),
        csr_us=1e6 * contest.seconds("csr") if has_csr else None,
        ours_us=1e6 * seconds,
        times_dense=contest.times_faster(dense),
        limit=contest.seconds(dense) * 1e9 * memory_gbps / case.nbytes,
        times_csr=contest.times_faster("csr") if has_csr else None,
        gbps=1e-9 * case.nbytes / seconds,
        memory_gbps=memory_gbps,
    )


def figure_of(row: Row) -> Figure:
    promised = row.values == "float32" and row.tokens == 1
    promise = PROMISES.get((row.kernel, row.zeros), (None, None)) if promised else (None, None)
    vectors = "1 vector" if row.tokens == 1 else f"{row.tokens} vectors"
    where = "zeros in the weight" if row.kernel == "gemv" else "zero inputs"
    name = f"{row.zeros:.0%} {where}, {row.values}, {vectors}"
    return Figure(name, row.times_dense, "x dense float32 torch", *promise, limit=row.limit)


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


def measured(make: Callable[[], Case], setup: Setup) -> Row:
    case = make()
    memory = kernels.roofline(setup.threads, seconds=0.05).load_gbps_dram
    contest = Contest({**case.calls, OURS: case.ours})
    contest.sweep(setup.timer, setup.rounds * setup.sweeps)
    return row_of(case, contest, memory)


def measure(setup: Setup) -> Findings:
    dense = torch.randn(LAYER)
    with torch.inference_mode():
        rows = [measured(make, setup) for make in makers(dense, setup.quick)]
    notes = [f"All rows: a weight of {LAYER[0]} x {LAYER[1]}, read from memory by every call."]
    return Findings(COLUMNS, rows, [figure_of(row) for row in rows], notes)


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=15, quick_rounds=15, sweeps=1))
