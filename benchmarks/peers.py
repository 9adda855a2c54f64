"""Whole networks with 90 % zeros against DeepSparse 1.8 with the same zeros.

    python benchmarks/peers.py [NAME ...] [--quick] [--json] [--threads N] [--check] [--save]

Each engine has a process of its own and they take turns, as in `aerogel bench`; ONNX Runtime runs
the dense network beside them. DeepSparse needs an environment of its own, see README.md. Where
aerogel is held to AVX2 (AEROGEL_ISA=avx2), so is DeepSparse (NM_ARCH=avx2).

One thread is timed by its process's CPU time, several by the wall clock. The limit beside a figure
is what the multiply-adds that are left would take at the measured peak.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch

import harness
from aerogel import bench, compress, kernels
from harness import Column, Figure, Findings, Setup
from networks import operations

ZEROS = 0.9
# (network, batch): what must be reached against DeepSparse, and where we want to be.
PROMISES = {
    ("mobilenet_v1", 1): (2.3, 3.2),
    ("mobilenet_v1", 16): (1.1, 1.5),
    ("resnet50", 1): (1.8, 2.5),
    ("resnet50", 16): (1.1, 1.5),
}
NAMES = {f"{network}-b{batch}": (network, batch) for network, batch in PROMISES}
PEERS = (bench.DeepSparse.name, bench.OnnxRuntime.name)

COLUMNS = (
    Column("network", "network"),
    Column("batch", "batch"),
    Column("engine", "engine"),
    Column("weights", "weights"),
    Column("ms", "ms", ".2f"),
    Column("low", "quartile", ".2f"),
    Column("high", "quartile", ".2f"),
    Column("times", "ours is", ".2f"),
    Column("error", "error", ".0e"),
    Column("missing", "not run"),
)


def compare(
    network: str, batch: int, setup: Setup, workers: bench.Workers
) -> tuple[bench.BenchTable, float]:
    """The table, and the seconds that the multiply-adds of the sparse network need at least."""
    pair, example = compress.random_networks(network, ZEROS)
    with torch.no_grad():
        least = (
            1e-9
            * batch
            * operations(pair.sparse, bench.Inputs.of(*example(1)))
            / setup.roof.fma_gflops
        )
    field = bench.lineup(
        pair.dense,
        pair.sparse,
        engines=[bench.OnnxRuntime()],
        sparse_engines=[bench.DeepSparse(), bench.Aerogel()],
        source=pair.source,
    )
    table = bench.compare(
        field,
        example(batch),
        threads=setup.threads,
        rounds=setup.rounds * setup.sweeps,
        clock="cpu" if setup.threads == 1 else "wall",
        workers=workers,
    )
    return table, least


def row_of(network: str, row: bench.BenchRow, table: bench.BenchTable) -> dict[str, Any]:
    found: dict[str, Any] = {
        "network": network,
        "batch": table.batch,
        "engine": row.engine,
        "weights": row.weights,
        "missing": row.missing or "",
    }
    if row.median is not None and row.low is not None and row.high is not None:
        found |= {"ms": 1e3 * row.median, "low": 1e3 * row.low, "high": 1e3 * row.high}
        found |= {"times": table.ratio(row.label, "aerogel (sparse)"), "error": row.max_error}
    return found


def measure(setup: Setup) -> Findings:
    notes = []
    if kernels.isa() == "avx2":
        os.environ.setdefault("NM_ARCH", "avx2")
        notes.append("DeepSparse was held to AVX2 too (NM_ARCH=avx2); ONNX Runtime was not.")
    rows, figures = [], []
    wanted = setup.options.names or NAMES
    cases = [NAMES[name] for name in wanted][: 1 if setup.quick else None]
    with bench.Workers() as workers:
        for network, batch in cases:
            table, least = compare(network, batch, setup, workers)
            found = {row.engine: row_of(network, row, table) for row in table.rows}
            rows += list(found.values())
            for engine in PEERS:
                if "times" not in found[engine]:
                    continue
                what = f"{network}, {ZEROS:.0%} unstructured, batch {batch}"
                promise = PROMISES[network, batch] if engine == "deepsparse" else (None, None)
                unit = f"x {engine} ({found[engine]['weights']})"
                limit = 1e-3 * found[engine]["ms"] / least
                figures.append(Figure(what, found[engine]["times"], unit, *promise, limit=limit))
    return Findings(COLUMNS, rows, figures, notes)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME", choices=[*NAMES, []], help=f"of {', '.join(NAMES)}"
    )


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=3, options=add_options))
