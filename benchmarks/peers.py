"""Whole networks with 90 % zeros against DeepSparse 1.8 with the same zeros.

    python benchmarks/peers.py [NAME ...] [--quick] [--json] [--threads N] [--check] [--save]

Each engine has a process of its own and they take turns, as in `aerogel bench`; ONNX Runtime runs
the dense network beside them. DeepSparse needs an environment of its own, see README.md. Where
aerogel is held to AVX2 (AEROGEL_ISA=avx2), so is DeepSparse (NM_ARCH=avx2).

One thread is timed by its process's CPU time, several by the wall clock. The limit beside a figure
supposes a network whose layers, one after the other, each run at the ceiling that binds it (see
`layer_limits`): a sum over layers, and less than what multiply-adds alone would allow.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from aerogel import bench, compress, kernels
from harness import Column, Figure, Findings, Setup

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


def layer_limits(
    network: nn.Module, inputs: bench.Inputs, batch: int, roof: kernels.Roofline
) -> Counter[str]:
    """The least seconds of a call, layer by layer, by the ceiling that binds each layer.

    A layer's multiply-adds run at the peak; each that skips zeros loads a vector of activations;
    its planes pass the second cache, and what exceeds that cache the last one, as do the weights,
    once for the whole batch. All of it overlaps, and layers without weights are free.

    Args:
        network: With zeros in its weights.
        inputs: Of one image.
        batch: Images of a call.
        roof: The machine's ceilings for all threads together.
    """
    seconds: Counter[str] = Counter()
    cache = roof.threads * second_cache_bytes()

    def add(module: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        kept, places = int(weight.count_nonzero()), batch * output[0].numel() // weight.shape[0]
        sparse = kept < weight.numel()
        planes = 4 * (given[0].numel() + output.numel())
        far = 4 * kept + batch * max(0, planes - cache)
        limits = {
            "multiply-adds": 2e-9 * kept * places / roof.fma_gflops,
            "loads": 4e-9 * kept * places / roof.load_gbps_l1 if sparse else 0.0,
            "the second cache": 1e-9 * batch * planes / roof.load_gbps_l2,
            "the last cache": 1e-9 * far / roof.load_gbps_l3,
        }
        name = max(limits, key=lambda each: limits[each])
        seconds[name] += limits[name]

    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(add) for layer in layers]
    network(*inputs.args, **inputs.kwargs)
    for handle in handles:
        handle.remove()
    return seconds


def second_cache_bytes() -> int:
    """Of one core; 2 MiB, more than most have, where the system does not say."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        return 2 << 20


def said(what: str, limits: Counter[str], limit: float, promise: tuple[float, float]) -> str:
    """What the layers' ceilings mean for a promise, in a sentence."""
    parts = ", ".join(f"{1e3 * each:.2f} by {name}" for name, each in limits.most_common())
    text = (
        f"{what}: layer by layer at the ceilings {1e3 * limits.total():.2f} ms at least ({parts}), "
        f"{limit:.2f} times as fast as DeepSparse was"
    )
    if limit < promise[0]:
        return f"{text}: {promise[0]:g} is out of reach on this machine unless layers are fused."
    return f"{text}; {promise[0] / limit:.0%} of that speed is promised."


def compare(
    network: str, batch: int, setup: Setup, workers: bench.Workers
) -> tuple[bench.BenchTable, Counter[str]]:
    """The table, and the least seconds of the sparse network by what binds its layers."""
    pair, example = compress.random_networks(network, ZEROS)
    with torch.no_grad():
        limits = layer_limits(pair.sparse, bench.Inputs.of(*example(1)), batch, setup.roof)
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
    return table, limits


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
    if harness.HELD:
        os.environ.setdefault("NM_ARCH", "avx2")
        notes.append("DeepSparse was held to AVX2 too (NM_ARCH=avx2); ONNX Runtime was not.")
    rows, figures = [], []
    wanted = setup.options.names or NAMES
    cases = [NAMES[name] for name in wanted][: 1 if setup.quick else None]
    with bench.Workers() as workers:
        for network, batch in cases:
            table, limits = compare(network, batch, setup, workers)
            found = {row.engine: row_of(network, row, table) for row in table.rows}
            rows += list(found.values())
            for engine in PEERS:
                if "times" not in found[engine]:
                    continue
                what = f"{network}, {ZEROS:.0%} unstructured, batch {batch}"
                promise = PROMISES[network, batch] if engine == "deepsparse" else (None, None)
                unit = f"x {engine} ({found[engine]['weights']})"
                limit = 1e-3 * found[engine]["ms"] / limits.total()
                if engine == "deepsparse":
                    notes.append(said(what, limits, limit, PROMISES[network, batch]))
                figures.append(Figure(what, found[engine]["times"], unit, *promise, limit=limit))
    return Findings(COLUMNS, rows, figures, notes)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", metavar="NAME", choices=[*NAMES, []], help=f"of {', '.join(NAMES)}"
    )


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=3, options=add_options))
