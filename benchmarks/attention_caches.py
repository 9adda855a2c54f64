"""Decoding on a KV cache in few bits against one in float32.

    python benchmarks/attention_caches.py [--quick] [--json] [--threads N] [--check] [--save]

One new token reads a prompt of random keys and values with 64 channels a head. The float32 cache is
read by torch's attention and by our own kernel for dense decoding; the others by the kernel that
keeps codes until they are in registers: 40 % of the tokens in 4 bits and the others in 2 as ZipVL
stores them, all in 4, all in 2. Before every call as many bytes as make any cache cold are read.
Bytes are those of codes and ranges.

The limit is the time of the codes' bytes at the bandwidth of memory, or that of three operations
per code (shift, look up, multiply and add) at the two vectors a cycle that the multiply-add
ceiling of the same run stands for: whichever is longer.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import harness
from aerogel import kernels
from aerogel.attention import attend
from aerogel.attention.quantise import quantise_keys, quantise_values, value_channels
from aerogel.kernels.attention_codes import CodedTokens
from harness import Call, Column, Figure, Findings, Setup

DIM, KEY_HEADS, IMPORTANT = 64, 8, 0.4
TOKENS, GROUPS = (4096, 32768), (1, 4)
COLD_BYTES = 512 << 20
CACHES = {"4/2 bits": (4, 2), "4 bits": (4, 4), "2 bits": (2, 2)}
PEERS = ("torch", "dense kernel")
# Not slower, and five times smaller: both for 4/2 bits, one query head a key head.
LEAST_SPEED, AIMED_SPEED, LEAST_SMALLER = 1.0, 4.0, 5.0

COLUMNS = (
    Column("tokens", "tokens"),
    Column("group", "query heads a key head"),
    Column("cache", "cache"),
    Column("smaller", "x smaller", ".1f"),
    Column("float_ms", "float32, torch ms", ".2f"),
    Column("dense_ms", "float32, ours ms", ".2f"),
    Column("ours_ms", "codes ms", ".3f"),
    Column("times", "x torch", ".2f"),
    Column("times_dense", "x ours in float32", ".2f"),
    Column("limit", "limit, x torch", ".1f"),
    Column("rate", "GB/s", ".1f"),
)


@dataclass(frozen=True)
class Row:
    """One cache against those in float32, cold."""

    tokens: int
    group: int
    cache: str
    smaller: float
    float_ms: float
    dense_ms: float
    ours_ms: float
    times: float
    times_dense: float
    limit: float
    rate: float


def coded(k: Tensor, v: Tensor, bits: tuple[int, int]) -> CodedTokens:
    """The first tokens in one number of bits, the others in another."""
    cut = round(IMPORTANT * k.shape[2])
    channel, store = value_channels(v), CodedTokens()
    for part, own in ((slice(0, cut), bits[0]), (slice(cut, None), bits[1])):
        keys, values = k[:, :, part], v[:, :, part]
        count = torch.full((1,), keys.shape[2])
        store.append(quantise_keys(keys, own), quantise_values(values, own, channel), count)
    return store


def bytes_of(store: CodedTokens) -> int:
    """Of codes and ranges."""
    parts = [t for keys, values, _ in store.segments for t in (*keys.parts(), *values.parts())]
    once = {t.data_ptr(): t for t in parts}
    return sum(t.numel() * t.element_size() for t in once.values())


def cold_times(calls: dict[str, Call], setup: Setup) -> dict[str, list[float]]:
    """Seconds of calls that take turns, each with nothing of its own in a cache."""
    other = torch.zeros(COLD_BYTES // 4)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(setup.rounds * setup.sweeps):
        for name, call in calls.items():
            other.sum()
            times[name].append(setup.timer.time(call, 1))
    return times


def rows_of(tokens: int, group: int, setup: Setup) -> list[Row]:
    k, v = (torch.randn(1, KEY_HEADS, tokens, DIM) for _ in range(2))
    q = torch.randn(1, KEY_HEADS * group, 1, DIM)
    stores = {name: coded(k, v, bits) for name, bits in CACHES.items()}
    calls: dict[str, Call] = {
        "torch": partial(scaled_dot_product_attention, q, k, v, enable_gqa=group > 1),
        "dense kernel": partial(attend, q, k, v, backend="native", validate=False),
    }
    calls |= {n: partial(store.attend, q, scale=DIM**-0.5) for n, store in stores.items()}
    times = cold_times(calls, setup)
    memory = kernels.roofline(setup.threads, seconds=0.05).load_gbps_dram
    numbers, rows = 2 * k.numel(), []
    peers = [1e3 * statistics.median(times[name]) for name in PEERS]
    for name, store in stores.items():
        nbytes, seconds = bytes_of(store), statistics.median(times[name])
        operations = numbers * (2 + group)
        floor = max(nbytes / (1e9 * memory), operations / (0.5e9 * setup.roof.fma_gflops))
        rows.append(
            Row(
                tokens, group, name, 4 * numbers / nbytes, *peers, 1e3 * seconds,
                *(harness.ratio(times[peer], times[name]) for peer in PEERS),
                1e-3 * peers[0] / floor, nbytes / seconds / 1e9,
            )
        )  # fmt: skip
    return rows


@torch.no_grad()
def measure(setup: Setup) -> Findings:
    tokens = TOKENS[-1:] if setup.quick else TOKENS
    rows = [row for n in tokens for group in GROUPS for row in rows_of(n, group, setup)]
    figures = []
    for row in rows:
        if row.cache != "4/2 bits" or row.group > 1:
            continue
        name = f"decode, {row.tokens} tokens in 4/2 bits"
        figures += [
            Figure(
                name, row.times, "x torch on a float32 cache", floor=LEAST_SPEED, aim=AIMED_SPEED,
                limit=row.limit,
            ),
            Figure(f"{name}: bytes", row.smaller, "x smaller than float32", floor=LEAST_SMALLER),
        ]  # fmt: skip
    notes = ["Caches are cold: half a gigabyte of something else is read before every call."]
    return Findings(COLUMNS, rows, figures, notes)


if __name__ == "__main__":
    raise SystemExit(harness.run(__doc__, measure, rounds=5, sweeps=3))
