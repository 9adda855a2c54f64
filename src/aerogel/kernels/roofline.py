"""What this machine can do: the two limits that a kernel's speed is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aerogel.kernels._library import native

# Half of a first-level cache of 32 KiB; most of a second level of 512 KiB; more than any second
# level, a share of a last one; far more than any last level. The larger caches of other machines
# only make the numbers labelled so come from a nearer level.
_L1_BYTES = 16 << 10
_L2_BYTES = 320 << 10
_L3_BYTES = 4 << 20
_DRAM_BYTES = 192 << 20


@dataclass(frozen=True)
class Roofline:
    """Ceilings of `threads` threads together.

    Attributes:
        threads: how many threads ran at once.
        isa: instruction set measured.
        fma_gflops: float32 multiply-adds, 10^9 operations a second (two per multiply-add).
        load_gbps_l1: loads that feed multiply-adds, aligned, from the first cache, 10^9 bytes/s.
        load_gbps_l2: the same from the second cache.
        load_gbps_l3: the same from the last cache.
        load_gbps_dram: the same from memory.
    """

    threads: int
    isa: str
    fma_gflops: float
    load_gbps_l1: float
    load_gbps_l2: float
    load_gbps_l3: float
    load_gbps_dram: float


def _best(measure: Callable[[int], float], seconds: float) -> float:
    """The best of the rounds that fit in `seconds`: a ceiling is what was reached, not a mean."""
    work = 1
    while True:  # make one round last about a tenth of the time
        begin = time.perf_counter()
        best = measure(work)
        spent = time.perf_counter() - begin
        if spent > seconds / 20 or work > 1 << 30:
            break
        work *= 2
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        best = max(best, measure(work))
    return best


def roofline(threads: int | None = None, *, seconds: float = 0.2) -> Roofline:
    """Measures the ceilings with native micro-benchmarks.

    Args:
        threads: threads at once, default `torch.get_num_threads()`.
        seconds: time for each of the five measurements, default 0.2.

    Raises:
        ValueError: threads < 1 or seconds <= 0.
        RuntimeError: the native kernels are not built.
    """
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1")
    if seconds <= 0:
        raise ValueError(f"seconds={seconds}: expected a positive time")
    module = native()

    def load(size: int) -> float:
        return _best(lambda rounds: module.load_gbps(threads, size, rounds), seconds)

    return Roofline(
        threads=threads,
        isa=module.isa(),
        fma_gflops=_best(lambda rounds: module.fma_gflops(threads, rounds * 1000), seconds),
        load_gbps_l1=load(_L1_BYTES),
        load_gbps_l2=load(_L2_BYTES),
        load_gbps_l3=load(_L3_BYTES),
        load_gbps_dram=load(_DRAM_BYTES),
    )
