"""Long convolutions against torch.fft, with short filters and left-out frequencies too.

    python benchmarks/fftconv.py [--quick] [--json] [--threads N] [--check] [--save]

The peer is what one writes in torch: the inverse real transform of a product of two, padded to
twice the length. Rows "filter" transform the filter in every call, on both sides, as training does;
rows "prepared" have it ready, on both sides; "step" is a training step, forward and backward. Calls
take turns; see harness.py.

The limit is what our calls would take at the machine's ceilings: their floating point operations at
the measured rate of multiply-adds, or, if that takes longer, their inputs, outputs, spectra and
factors, once each, from the nearest cache that holds what one sequence needs. Most operations of a
transform are additions, which are half as fast as multiply-adds by this count.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import harness
from aerogel import kernels
from aerogel.kernels import FrequencyMask, PreparedFilter, fft_conv, fft_conv_trainable
from aerogel.kernels.fft_conv_plan import Route, find_route
from aerogel.kernels.monarch import monarch_conv
from harness import OURS, Call, Column, Contest, Figure, Findings, Setup

# (length, sequences): about as much work in each row.
DENSE = ((4_096, 64), (16_384, 32), (65_536, 16), (262_144, 8), (1_048_576, 2))
QUICK = DENSE[:2]
MODES = ("filter", "prepared", "gates", "step")
PARTIAL = (65_536, 8, (64, 256, 1_024, 4_096))  # length, channels, taps
SPARSE = ((4_096, 128), (16_384, 128))  # transform of twice the length, sequences
OUTER, KEPT = 16, (4, 2, 1)
MONARCH_LENGTH = 16_384  # the longest of the rows that also run the matrix form
BATCH = 4  # sequences that share a filter in the rows with gates and of training

COLUMNS = (
    Column("case", "case"),
    Column("length", "length"),
    Column("sequences", "sequences"),
    Column("torch_ms", "torch.fft ms", ".2f"),
    Column("ours_ms", "ours ms", ".3f"),
    Column("times_torch", "x torch.fft", ".2f"),
    Column("limit", "limit", ".1f"),
    Column("gflops", "GFLOP/s", ".1f"),
    Column("monarch", "Monarch x torch.fft", ".2f"),
)


@dataclass(frozen=True)
class Case:
    """One comparison."""

    name: str
    length: int
    sequences: int
    torch: Call
    ours: Call
    flops: float
    nbytes: float
    resident: float  # bytes that one sequence's convolution needs at hand
    monarch: Call | None = None
    floor: float | None = None
    aim: float | None = None


@dataclass(frozen=True)
class Row:
    """One result; times in milliseconds, ratios of the other's time to ours."""

    case: str
    length: int
    sequences: int
    torch_ms: float
    ours_ms: float
    times_torch: float
    limit: float
    gflops: float
    monarch: float | None


def torch_conv(u: Tensor, k: Tensor, n: int) -> Tensor:
    """What one writes without this library."""
    spectrum = torch.fft.rfft(k, n=n)
    return torch.fft.irfft(torch.fft.rfft(u, n=n) * spectrum, n=n)[..., : u.shape[-1]]


def prepared_torch(u: Tensor, k: Tensor, n: int) -> Call:
    spectrum = torch.fft.rfft(k, n=n)
    return lambda: torch.fft.irfft(torch.fft.rfft(u, n=n) * spectrum, n=n)[..., : u.shape[-1]]


def step_of(convolve: Callable[[Tensor, Tensor], Tensor], u: Tensor, k: Tensor) -> Call:
    """Forward and backward."""
    inputs, dy = (u.clone().requires_grad_(), k.clone().requires_grad_()), torch.randn_like(u)
    return lambda: torch.autograd.grad(convolve(*inputs), inputs, dy)


def work_of(route: Route, length: int, transforms: float) -> tuple[float, float]:
    """(operations, bytes at hand) of one sequence; 2 transforms make a convolution."""
    part = route.n // route.outer
    spans = -(-length // (route.inputs * part))
    inner = 4.25 * part * math.log2(part) * route.blocks  # splits into four: 34 for 4 values x 2
    outer = 4.0 * part * route.blocks * route.inputs
    product = 6.0 * part * route.blocks
    flops = spans * (transforms * (inner + outer) + product * (transforms >= 2))
    values = 8.0 * part * route.blocks  # complex
    return flops, 3 * values


def case_of(mode: str, length: int, sequences: int) -> Case:
    n = 2 * length
    batch = BATCH if mode in ("gates", "step") and sequences % BATCH == 0 else 1
    channels = sequences // batch
    u, k = torch.randn(batch, channels, length), torch.randn(channels, length) / length
    route = find_route(n, length, length, True, None)
    assert route is not None
    transforms = {"step": 6.0}.get(mode, 2.0)
    flops, resident = work_of(route, length, transforms)
    total = sequences * flops
    if mode in ("filter", "gates", "step"):
        total += channels * work_of(route, length, 1.0)[0]
    nbytes = sequences * length * 8.0 + channels * resident
    monarch: Call | None = None
    theirs: Call
    ours: Call
    if mode == "filter":
        theirs, ours = lambda: torch_conv(u, k, n), lambda: fft_conv(u, k)
        if length <= MONARCH_LENGTH:
            monarch = lambda: monarch_conv(u, k, n)  # noqa: E731
    elif mode == "prepared":
        theirs, prepared = prepared_torch(u, k, n), PreparedFilter(k, length)
        ours = lambda: prepared(u)  # noqa: E731
    elif mode == "gates":
        v, w = torch.randn_like(u), torch.randn_like(u)
        nbytes += sequences * length * 8.0
        theirs, ours = lambda: w * torch_conv(v * u, k, n), lambda: fft_conv(u, k, v, w)
    else:
        theirs = step_of(lambda u, k: torch_conv(u, k, n), u, k)
        ours = step_of(fft_conv_trainable, u, k)
    floor, aim = (1.9, 4.0) if mode == "filter" else (None, None)
    return Case(mode, length, sequences, theirs, ours, total, nbytes, resident, monarch, floor, aim)


def partial_case(length: int, channels: int, taps: int) -> Case:
    u, k = torch.randn(1, channels, length), torch.randn(channels, taps)
    route = find_route(2 * length, length, taps, True, None)
    assert route is not None
    flops, resident = work_of(route, length, 2.0)
    return Case(
        f"{taps} taps",
        length,
        channels,
        lambda: torch_conv(u, k, 2 * length),
        lambda: fft_conv(u, k),
        channels * flops,
        channels * (8.0 * length + resident),
        resident,
        floor=2.0 if taps <= 1_024 else None,
    )


def sparse_case(n: int, sequences: int, kept: int) -> Case:
    """Frequencies in blocks; the peer computes all of them."""
    length, mask = n // 2, FrequencyMask((OUTER, n // OUTER), (OUTER - kept, 0))
    u, k = torch.randn(1, sequences, length), torch.randn(sequences, length) / length
    route = find_route(n, length, length, True, mask)
    assert route is not None
    flops, resident = work_of(route, length, 2.0)
    own, nbytes = work_of(route, length, 1.0)[0], 8.0 * length + resident
    floor = {4_096: 1.5, 16_384: 2.5}[n] if kept == 2 else None
    return Case(
        f"{1 - kept / OUTER:.0%} of frequencies zero",
        length,
        sequences,
        lambda: torch_conv(u, k, n),
        lambda: fft_conv(u, k, n=n, mask=mask),
        sequences * (flops + own),
        sequences * nbytes,
        resident,
        lambda: monarch_conv(u, k, n, mask, hybrid=True),
        floor,
    )


def cases(quick: bool) -> Iterator[Case]:
    for mode in MODES[:1] if quick else MODES:
        for length, sequences in QUICK if quick else DENSE:
            yield case_of(mode, length, sequences)
    length, channels, all_taps = PARTIAL
    for taps in all_taps[2:3] if quick else all_taps:
        yield partial_case(length, channels, taps)
    for n, sequences in SPARSE:
        for kept in KEPT[1:2] if quick else KEPT:
            yield sparse_case(n, sequences, kept)


def bandwidth(roof: kernels.Roofline, nbytes: float) -> float:
    """GB/s of the nearest level that holds so much."""
    for size, gbps in ((32 << 10, roof.load_gbps_l1), (1 << 20, roof.load_gbps_l2)):
        if nbytes <= size:
            return gbps
    return roof.load_gbps_l3 if nbytes <= 32 << 20 else roof.load_gbps_dram


def measured(case: Case, setup: Setup) -> Row:
    calls = {"torch": case.torch, OURS: case.ours}
    if case.monarch is not None:
        calls["monarch"] = case.monarch
    contest = Contest(calls)
    contest.sweep(setup.timer, setup.rounds * setup.sweeps)
    ours, theirs = contest.seconds(), contest.seconds("torch")
    least = max(
        case.flops / setup.roof.fma_gflops,
        case.nbytes / bandwidth(setup.roof, case.resident),
    )
    monarch = None
    if case.monarch is not None:
        monarch = contest.times_faster("torch") / contest.times_faster("monarch")
    return Row(
        case.name,
        case.length,
        case.sequences,
        1e3 * theirs,
        1e3 * ours,
        contest.times_faster("torch"),
        theirs / (1e-9 * least),
        1e-9 * case.flops / ours,
        monarch,
    )


def measure(setup: Setup) -> Findings:
    rows, figures = [], []
    for case in cases(setup.quick):
        row = measured(case, setup)
        rows.append(row)
        name = f"{case.name}, {case.length} x {case.sequences}"
        figures.append(
            Figure(name, row.times_torch, "x torch.fft", case.floor, case.aim, limit=row.limit)
        )
    notes = [
        f"Rows with gates and of training have a batch of {BATCH}, where the sequences allow.",
        "Zero frequencies: transforms of twice the length; torch.fft computes all of them, and the "
        "column of the matrix form is the hybrid that skips them, in torch.",
    ]
    return Findings(COLUMNS, rows, figures, notes)


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=7, quick_rounds=3, sweeps=1))
