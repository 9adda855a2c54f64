"""Whole sparse networks at 224 x 224 against dense engines, in one process.

    python benchmarks/networks.py [NAME ...] [--threads N] [--rounds N] [--explain] [--json]

The networks have random weights of which the smallest in each pruned layer are zero, and batch
norms with statistics of their own. All engines run the same network in turn, round by round, each
after an untimed call of its own; a ratio is taken in every round, and the median of the ratios is
printed with its quartiles. One thread is timed by the process's CPU time, which other processes do
not enter; several by the wall clock. With several threads the network compiled for one runs too.

The limit is what the multiply-adds that are left would take at the measured peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import aerogel
from aerogel import bench, kernels, models
from aerogel.train.allocator import keep_freed_memory

OURS, ALONE, PEER = "aerogel", "aerogel, 1 thread", "onnxruntime"
PEERS = (bench.TorchEager(), bench.TorchChannelsLast(), bench.OnnxRuntime(), bench.OpenVino())
TWO_THREADS = 1.7  # times one thread, at least


@dataclass(frozen=True)
class Case:
    """A network and what it must reach over ONNX Runtime on one thread."""

    model: str
    batch: int
    sparsity: float
    block: int
    floor: float

    @property
    def name(self) -> str:
        """As the command line takes it."""
        block = f"-{self.block}x1" if self.block > 1 else ""
        return f"{self.model}{block}-b{self.batch}"


CASES = (
    Case("mobilenet_v1", 1, 0.90, 1, 2.6),
    Case("mobilenet_v1", 1, 0.90, 4, 3.0),
    Case("mobilenet_v1", 16, 0.90, 1, 2.5),
    Case("mobilenet_v2", 1, 0.85, 1, 2.0),
    Case("resnet50", 1, 0.90, 1, 2.8),
    Case("resnet50", 1, 0.90, 4, 2.8),
    Case("resnet50", 16, 0.90, 1, 2.8),
)


@dataclass
class Result:
    """Milliseconds of each engine, and how many times ours each of them takes."""

    case: Case
    limit_ms: float
    error: float
    runs_as: str
    samples: dict[str, list[float]]
    missing: dict[str, str] = field(default_factory=dict)

    def median_ms(self, engine: str) -> float:
        return 1e3 * statistics.median(self.samples[engine])

    def ratios(self, engine: str) -> tuple[float, float, float]:
        """Quartiles, the median in the middle."""
        pairs = zip(self.samples[engine], self.samples[OURS], strict=True)
        low, middle, high = statistics.quantiles((t / o for t, o in pairs), method="inclusive")
        return low, middle, high

    def shortfalls(self) -> list[str]:
        """What it does not reach, in words."""
        wanted = {ALONE: TWO_THREADS} if ALONE in self.samples else {PEER: self.case.floor}
        return [
            f"{self.case.name}: {self.ratios(engine)[1]:.2f} x {engine}, expected {floor}"
            for engine, floor in wanted.items()
            if engine in self.samples and self.ratios(engine)[1] < floor
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.case),
            "limit_ms": self.limit_ms,
            "error": self.error,
            "runs_as": self.runs_as,
            "missing": self.missing,
            "median_ms": {engine: self.median_ms(engine) for engine in self.samples},
            "ratios": {engine: self.ratios(engine) for engine in self.samples},
        }


def make_network(case: Case) -> nn.Module:
    """The pruned network, ready for inference."""
    extra = {"zero_init_last": False} if case.model.startswith("resnet") else {}
    network = models.create_model(case.model, **extra).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0.0, 0.1)
    for name, _ in network.prune_targets():
        remove_smallest(network.get_submodule(name).weight, case.sparsity, case.block)
    return network


def remove_smallest(weight: Tensor, sparsity: float, block: int) -> None:
    """Zeros where the magnitudes of `block` neighbouring output channels are smallest together."""
    groups = weight.view(weight.shape[0] // block, block, -1)
    scores = groups.abs().sum(1)
    threshold = scores.flatten().kthvalue(round(sparsity * scores.numel())).values
    groups *= (scores > threshold)[:, None]


def operations(network: nn.Module, images: Tensor) -> int:
    """Two for every multiply-add with a weight that is not zero."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        places = output.numel() // output.shape[1]
        total += 2 * int(module.weight.count_nonzero()) * places

    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    network(images)
    for handle in handles:
        handle.remove()
    return total


def run(case: Case, options: argparse.Namespace, workspace: bench.Workspace) -> Result:
    """Compiles, checks and times one case."""
    network, images = make_network(case), torch.randn(case.batch, 3, 224, 224)
    compiled = aerogel.compile(network, images, threads=options.threads)
    expected = network(images)
    error = float((compiled(images) - expected).abs().max() / expected.abs().max())
    calls: dict[str, Callable[[], Any]] = {OURS: lambda: compiled(images)}
    if options.threads > 1:
        alone = aerogel.compile(network, images, threads=1)
        calls[ALONE] = lambda: alone(images)
    missing = {}
    for engine in PEERS:
        reason = engine.available()
        if reason is None:
            inputs = bench.Inputs.of(images)
            calls[engine.name] = engine.prepare(network, inputs, options.threads, workspace)
        else:
            missing[engine.name] = reason
    if options.explain:
        print(f"\n{compiled.explain()}\n")
    peak = 1e9 * kernels.roofline(options.threads).fma_gflops
    limit = 1e3 * operations(network, images) / peak
    samples = take_turns(calls, options.threads, options.rounds)
    return Result(case, limit, error, compiled.explain().chosen, samples, missing)


def take_turns(
    calls: dict[str, Callable[[], Any]], threads: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call, one a round."""
    clock = time.process_time if threads == 1 else time.perf_counter
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            begin = clock()
            call()
            samples[name].append(clock() - begin)
    return samples


def print_result(result: Result) -> None:
    ours = result.median_ms(OURS)
    print(
        f"\n{result.case.name}, {result.case.sparsity:.0%} zeros: {ours:.2f} ms as "
        f"{result.runs_as}, limit {result.limit_ms:.2f} ms ({result.limit_ms / ours:.0%}), "
        f"relative error {result.error:.0e}, floor {result.case.floor} x {PEER}"
    )
    for engine in result.samples:
        if engine == OURS:
            continue
        low, middle, high = result.ratios(engine)
        median = result.median_ms(engine)
        print(f"  {engine:<20s}{median:9.2f} ms  {middle:5.2f} x ours  ({low:.2f} to {high:.2f})")
    for engine, reason in result.missing.items():
        print(f"  {engine:<20s}missing: {reason}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(names)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--explain", action="store_true", help="print kernel and time by layer")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="exit 1 below a floor")
    options = parser.parse_args()
    unknown = set(options.names) - set(names)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}: expected of {', '.join(names)}")
    return options


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    results = []
    if not options.json:
        print(f"torch {torch.__version__}, {kernels.isa()}, {options.threads} thread(s)")
    with bench.Workspace() as workspace, torch.no_grad():
        for case in CASES:
            if options.names and case.name not in options.names:
                continue
            torch.manual_seed(0)
            results.append(run(case, options, workspace))
            if not options.json:
                print_result(results[-1])
    if options.json:
        rows = [result.to_dict() for result in results]
        print(
            json.dumps({"threads": options.threads, "isa": kernels.isa(), "rows": rows}, indent=2)
        )
    missed = [text for result in results for text in result.shortfalls()]
    for text in missed:
        print(f"below its floor: {text}", file=sys.stderr)
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
