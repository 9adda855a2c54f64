"""Whole sparse networks at 224 x 224 against dense engines.

    python benchmarks/networks.py [NAME ...] [--explain] [--quick] [--json] [--threads N] [--check]

Of the weights, the smallest in each pruned layer are zero. MobileNetV2's are real (torchvision's,
trained on ImageNet, see aerogel.data); all others, and MobileNetV2's where they cannot be had, are
random, and batch norms have statistics of their own. All engines run the same network in turn (see
harness.py), each sample one call after untimed ones that took 30 ms together: what an engine finds
in caches that others used before settles within a few calls, by up to a third of its time (networks
that run now and then are in fast_sparse_convnets.py). One thread is timed by the process's CPU
time. With several threads the network compiled for one runs too, and everybody pauses first, until
the threads of the one before have gone to sleep.

The limit is what the multiply-adds that are left would take at the measured peak.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import aerogel
import harness
from aerogel import bench, compress, data, models
from harness import Column, Figure, Findings, Setup

OURS, ALONE, PEER = "aerogel", "aerogel, 1 thread", "onnxruntime"
PEERS = (bench.TorchEager(), bench.TorchChannelsLast(), bench.OnnxRuntime(), bench.OpenVino())
TWO_THREADS = 1.7  # times one thread, at least
PAUSE_SECONDS = 0.05  # idle threads of a pool spin for some milliseconds before they sleep
WARM_SECONDS = 0.03  # of calls before the one that is timed; at least one
PRETRAINED = ("mobilenet_v2",)

COLUMNS = (
    Column("network", "network"),
    Column("weights", "weights"),
    Column("zeros", "zeros", ".0%"),
    Column("block", "block"),
    Column("batch", "batch"),
    Column("engine", "engine"),
    Column("ms", "ms", ".2f"),
    Column("times", "ours is", ".2f"),
    Column("low", "quartile", ".2f"),
    Column("high", "quartile", ".2f"),
    Column("of_limit", "of limit", ".0%"),
    Column("error", "error", ".0e"),
    Column("missing", "not run"),
)


@dataclass(frozen=True)
class Case:
    """A network and what it must reach over its dense peer on one thread."""

    model: str
    batch: int
    sparsity: float
    block: int
    floor: float
    aim: float | None = None

    @property
    def name(self) -> str:
        """As the command line takes it."""
        block = f"-{self.block}x1" if self.block > 1 else ""
        return f"{self.model}{block}-b{self.batch}"


CASES = (
    Case("mobilenet_v1", 1, 0.90, 1, 2.6, 3.5),
    Case("mobilenet_v1", 1, 0.90, 4, 3.0, 4.2),
    Case("mobilenet_v1", 16, 0.90, 1, 2.5, 3.4),
    Case("mobilenet_v2", 1, 0.85, 1, 2.0, 2.8),
    Case("resnet50", 1, 0.90, 1, 2.8, 3.8),
    Case("resnet50", 1, 0.90, 4, 2.8),
    Case("resnet50", 16, 0.90, 1, 2.8, 3.8),
)


def trained_weights(case: Case) -> Path | None:
    """Where a trained network's weights are, or None if there are none here."""
    if case.model not in PRETRAINED:
        return None
    try:
        return data.fetch_checkpoint(case.model)
    except (OSError, data.FetchError) as error:
        print(f"{case.model}: random weights, because {error}", file=sys.stderr)
        return None


def make_network(case: Case, trained: Path | None = None) -> nn.Module:
    """The pruned network, ready for inference, with trained weights or random ones."""
    if trained is not None:
        network = models.create_model(case.model, checkpoint_path=trained)
        network = network.eval().requires_grad_(False)
    else:
        network = models.create_model(case.model).eval().requires_grad_(False)
        compress.vary_norms(network)
    for name, _ in network.prune_targets():
        remove_smallest(network.get_submodule(name).weight, case.sparsity, case.block)
    return network


def remove_smallest(weight: Tensor, sparsity: float, block: int) -> None:
    """Zeros where the magnitudes of `block` neighbouring output channels are smallest together."""
    groups = weight.view(weight.shape[0] // block, block, -1)
    scores = groups.abs().sum(1)
    threshold = scores.flatten().kthvalue(round(sparsity * scores.numel())).values
    groups *= (scores > threshold)[:, None]


def operations(network: nn.Module, inputs: bench.Inputs) -> int:
    """Two for every multiply-add with a weight that is not zero."""
    total = 0

    def count(module: Any, _: object, output: Tensor) -> None:
        nonlocal total
        places = output.numel() // module.weight.shape[0]
        total += 2 * int(module.weight.count_nonzero()) * places

    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    network(*inputs.args, **inputs.kwargs)
    for handle in handles:
        handle.remove()
    return total


def samples_of(
    name: str,
    setup: Setup,
    network: nn.Module,
    inputs: bench.Inputs,
    engines: Sequence[bench.Engine],
    workspace: bench.Workspace,
) -> tuple[dict[str, list[float]], dict[str, str], float]:
    """Seconds of each engine in turn, why others are missing, and our relative error."""
    example: Any = inputs.kwargs or inputs.args
    compiled = aerogel.compile(network, example, threads=setup.threads)
    if setup.options.explain:
        print(f"\n{name}\n{compiled.explain()}\n", file=sys.stderr)
    args, kwargs = inputs.args, inputs.kwargs
    error = relative_error(compiled(*args, **kwargs), network(*args, **kwargs))
    calls: dict[str, Callable[[], Any]] = {OURS: lambda: compiled(*args, **kwargs)}
    if setup.threads > 1:
        alone = aerogel.compile(network, example, threads=1)
        calls[ALONE] = lambda: alone(*args, **kwargs)
    missing = {}
    for engine in engines:
        reason = engine.available()
        if reason is None:
            calls[engine.name] = engine.prepare(network, inputs, setup.threads, workspace)
        else:
            missing[engine.name] = reason
    return take_turns(calls, setup.threads, setup.rounds * setup.sweeps), missing, error


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest difference of the first output, relative to its largest value."""
    first, expected = (pytree.tree_leaves(y)[0] for y in (ours, theirs))
    return float((first - expected).abs().max() / expected.abs().max())


def take_turns(
    calls: dict[str, Callable[[], Any]], threads: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call, one a round. Engines may use threads of their own: all are counted."""
    clock = time.process_time if threads == 1 else time.perf_counter
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if threads > 1:
                time.sleep(PAUSE_SECONDS)
            warm_until = time.perf_counter() + WARM_SECONDS
            call()
            while time.perf_counter() < warm_until:
                call()
            begin = clock()
            call()
            samples[name].append(clock() - begin)
    return samples


def rows_of(
    case: Case, weights: str, samples: dict[str, list[float]], limit: float, error: float
) -> list[dict[str, Any]]:
    ours = samples[OURS]
    rows = []
    for engine, seconds in samples.items():
        row: dict[str, Any] = {
            "network": case.model,
            "weights": weights,
            "zeros": case.sparsity,
            "block": f"{case.block}x1",
            "batch": case.batch,
            "engine": engine,
            "ms": 1e3 * statistics.median(seconds),
        }
        if engine == OURS:
            row |= {"of_limit": limit / statistics.median(ours), "error": error}
        else:
            ratios = [a / b for a, b in zip(seconds, ours, strict=True)]
            low, middle, high = statistics.quantiles(ratios, method="inclusive")
            row |= {"times": middle, "low": low, "high": high}
        rows.append(row)
    return rows


def missing_rows(network: str, reasons: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each engine that could not run, with the reason."""
    return [
        {"network": network, "engine": engine, "missing": reason}
        for engine, reason in reasons.items()
    ]


def figures_of(case: Case, samples: dict[str, list[float]]) -> list[Figure]:
    name = f"{case.model}, {case.sparsity:.0%} zeros in {case.block}x1, batch {case.batch}"
    found = []
    if PEER in samples:
        times = harness.ratio(samples[PEER], samples[OURS])
        found.append(Figure(name, times, f"x {PEER} (dense)", case.floor, case.aim))
    if ALONE in samples:
        times = harness.ratio(samples[ALONE], samples[OURS])
        found.append(Figure(name, times, "x one thread", TWO_THREADS, threads=2))
    return found


def wanted(cases: Sequence[Case], setup: Setup) -> list[Case]:
    """Those that the command line names, or all; the first alone with --quick."""
    names = setup.options.names or [case.name for case in cases]
    return [case for case in cases if case.name in names][: 1 if setup.quick else None]


def measure(setup: Setup) -> Findings:
    rows: list[dict[str, Any]] = []
    figures: list[Figure] = []
    with bench.Workspace() as workspace, torch.no_grad():
        for case in wanted(CASES, setup):
            torch.manual_seed(0)
            trained = trained_weights(case)
            network = make_network(case, trained)
            inputs = bench.Inputs.of(torch.randn(case.batch, 3, 224, 224))
            weights = "random" if trained is None else "ImageNet"
            samples, missing, error = samples_of(
                case.name, setup, network, inputs, PEERS, workspace
            )
            limit = 1e-9 * operations(network, inputs) / setup.roof.fma_gflops
            rows += rows_of(case, weights, samples, limit, error)
            rows += missing_rows(case.model, missing)
            figures += figures_of(case, samples)
    return Findings(COLUMNS, rows, figures)


def add_options(parser: argparse.ArgumentParser, cases: Sequence[Case] = CASES) -> None:
    names = [case.name for case in cases]
    parser.add_argument(
        "names", nargs="*", metavar="NAME", choices=[*names, []], help=f"of {', '.join(names)}"
    )
    parser.add_argument("--explain", action="store_true", help="print kernel and time by layer")


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=3, quick_rounds=3, options=add_options))
