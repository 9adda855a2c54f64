"""Whole sparse transformers against dense engines, in one process.

    python benchmarks/transformer_networks.py [NAME ...] [--threads N] [--rounds N] [--explain]

BERT-base and ViT-S/16 have random weights, MiniLM its own, where they can be had; the smallest in
each linear layer of the blocks are zero. Peers run the same network, zeros included, which none of
them gains from. How engines take turns, and what the ratios are, is told in harness.py.

The limit is what the multiply-adds that are left, those of attention included, would take at the
measured peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import aerogel
import networks
from aerogel import bench, data, kernels, models
from aerogel.train.allocator import keep_freed_memory
from networks import ALONE, OURS

PEERS = (bench.TorchEager(), bench.OnnxRuntime(), bench.OpenVino())
TWO_THREADS = 1.7  # times one thread, at least


@dataclass(frozen=True)
class Case:
    """A network, its zeros, and what it must reach over the fastest dense peer on one thread."""

    model: str
    sparsity: float
    block: int
    floor: float

    @property
    def name(self) -> str:
        """As the command line takes it."""
        return f"{self.model}-{self.block}x1" if self.block > 1 else self.model


CASES = (
    Case("vit_s16", 0.90, 1, 2.3),
    Case("vit_s16", 0.90, 4, 3.5),
    Case("bert_base", 0.90, 1, 2.3),
    Case("bert_base", 0.90, 4, 3.5),
    Case("minilm", 0.80, 4, 2.0),
)


@dataclass(frozen=True)
class Network:
    """A transformer and the inputs it is timed on."""

    module: nn.Module
    inputs: dict[str, Any]
    batch: int
    tokens: int
    layers: int
    width: int

    @property
    def attention_operations(self) -> int:
        """Two products of queries, keys and values in each layer."""
        return 4 * self.batch * self.layers * self.tokens**2 * self.width


def vit_s16() -> Network:
    """ViT-S/16 on one image of 224 x 224, 197 tokens."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    images = {"pixel_values": torch.randn(1, 3, 224, 224)}
    return Network(transformers.ViTForImageClassification(config), images, 1, 197, 12, 384)


def bert_base() -> Network:
    """BERT-base on one text of 128 tokens."""
    import transformers

    module = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    return Network(module, texts(1, 128), 1, 128, 12, 768)


def minilm() -> Network:
    """all-MiniLM-L6-v2 on 32 texts of 64 tokens."""
    try:
        folder = data.fetch_checkpoint("minilm")
    except data.FetchError as error:
        print(f"minilm with random weights: {error}", file=sys.stderr)
        folder = None
    return Network(models.create_model("minilm", folder=folder), texts(32, 64), 32, 64, 6, 384)


def texts(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Token numbers without padding, and the mask that says so."""
    ids = torch.randint(1000, 30_000, (batch, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def remove_smallest(network: nn.Module, sparsity: float, block: int) -> None:
    """Prunes the linear layers of the blocks; patches, heads and poolers stay dense."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".layer" in f".{name}":
            networks.remove_smallest(module.weight, sparsity, block)


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

    @property
    def fastest_peer(self) -> str:
        """By the median of its ratios."""
        peers = [engine for engine in self.samples if engine not in (OURS, ALONE)]
        return min(peers, key=lambda engine: self.ratios(engine)[1])

    def shortfalls(self) -> list[str]:
        """What it does not reach, in words."""
        wanted = {ALONE: TWO_THREADS} if ALONE in self.samples else {}
        wanted = wanted or {self.fastest_peer: self.case.floor}
        return [
            f"{self.case.name}: {self.ratios(engine)[1]:.2f} x {engine}, expected {floor}"
            for engine, floor in wanted.items()
            if self.ratios(engine)[1] < floor
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.case),
            "limit_ms": self.limit_ms,
            "error": self.error,
            "runs_as": self.runs_as,
            "fastest_peer": self.fastest_peer,
            "missing": self.missing,
            "median_ms": {engine: self.median_ms(engine) for engine in self.samples},
            "ratios": {engine: self.ratios(engine) for engine in self.samples},
        }


def operations(network: Network) -> int:
    """Two for every multiply-add with a weight that is not zero, and attention's."""
    total = network.attention_operations

    def count(module: Any, _: object, output: torch.Tensor) -> None:
        nonlocal total
        places = output.numel() // module.weight.shape[0]
        total += 2 * int(module.weight.count_nonzero()) * places

    layers = [m for m in network.module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    network.module(**network.inputs)
    for handle in handles:
        handle.remove()
    return total


def run(case: Case, options: argparse.Namespace, workspace: bench.Workspace) -> Result:
    """Compiles, checks and times one case."""
    network: Network = globals()[case.model]()
    module = network.module.eval().requires_grad_(False)
    remove_smallest(module, case.sparsity, case.block)
    example = network.inputs
    compiled = aerogel.compile(module, example, threads=options.threads)
    error = relative_error(compiled(**example), module(**example))
    calls: dict[str, Callable[[], Any]] = {OURS: lambda: compiled(**example)}
    if options.threads > 1:
        alone = aerogel.compile(module, example, threads=1)
        calls[ALONE] = lambda: alone(**example)
    missing = {}
    for engine in PEERS:
        reason = engine.available()
        if reason is None:
            inputs = bench.Inputs(kwargs=dict(example))
            calls[engine.name] = engine.prepare(module, inputs, options.threads, workspace)
        else:
            missing[engine.name] = reason
    if options.explain:
        print(f"\n{compiled.explain()}\n")
    peak = 1e9 * kernels.roofline(options.threads).fma_gflops
    limit = 1e3 * operations(network) / peak
    samples = networks.take_turns(calls, options.threads, options.rounds)
    return Result(case, limit, error, compiled.explain().chosen, samples, missing)


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest difference of the first output, relative to its largest value."""
    first, expected = (y if isinstance(y, torch.Tensor) else y[0] for y in (ours, theirs))
    return float((first - expected).abs().max() / expected.abs().max())


def print_result(result: Result) -> None:
    ours = result.median_ms(OURS)
    print(
        f"\n{result.case.name}, {result.case.sparsity:.0%} zeros: {ours:.2f} ms as "
        f"{result.runs_as}, limit {result.limit_ms:.2f} ms ({result.limit_ms / ours:.0%}), "
        f"relative error {result.error:.0e}, floor {result.case.floor} x {result.fastest_peer}"
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
