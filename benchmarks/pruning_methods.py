"""Networks pruned by every method, compiled, against dense engines.

    python benchmarks/pruning_methods.py [METHOD ...] [--networks DIR] [--explain] [--quick]
                                         [--json] [--threads N] [--check]

Each method of aerogel.pruning.METHODS prunes a whole network at 224 x 224 by its own pattern, in a
dozen steps on noise: where its zeros are counts here, not what the network knows. Those for
convolutions prune MobileNetV2, from torchvision's ImageNet weights where the method starts from a
trained network (random ones where they cannot be had); those for transformers ViT-S/16 and the one
for filters ResNet-50, from random weights. With --networks pruned networks are kept in that folder,
and those that are there are not pruned again.

Floors are what the other benchmarks promise for the pattern: MobileNetV2 with 85 % zeros, and
MobileNetV1 with 90 % in blocks of four, over ONNX Runtime; ViT-S/16 over the fastest dense engine;
and of N:M patterns the pruned layers alone over dense torch, as compiling measured both on the
network's 197 tokens. They are for zeros spread evenly over the layers: where a method leaves more
multiply-adds than that, they shrink in proportion. A method whose network is larger than the dense
one, or has no zeros, is only held to be no slower than eager torch on its network. How engines take
turns is told in harness.py, and how whole networks are timed in networks.py.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import aerogel
import harness
import networks
from aerogel import bench, compress, models, pruning
from aerogel.pruning import METHODS, RewritingMethod
from aerogel.pruning.selection import pruned_parameters
from harness import Column, Figure, Findings, Setup
from networks import OURS

TORCH, ONNX = bench.TorchEager(), bench.OnnxRuntime()
PEERS = (TORCH, ONNX, bench.OpenVino())
ORIGINAL = "original"
PIXELS = 224
STEPS, UPDATES, BATCH = 12, 4, 2
SMALL_PIXELS = 64  # of what convolutions are trained on here
LEARNING_RATE = 1e-4  # too small to undo what the weights were trained for
UNSTRUCTURED, GROUPS = "unstructured", "kernel-group:4"

COLUMNS = (
    Column("method", "method"),
    Column("network", "network"),
    Column("pattern", "pattern"),
    Column("zeros", "zeros of pruned layers", ".0%"),
    Column("left", "multiply-adds left", ".0%"),
    Column("even", "left if spread evenly", ".0%"),
    Column("ms", "ours ms", ".2f"),
    Column("of_limit", "of limit", ".0%"),
    Column("error", "error", ".0e"),
    Column("torch eager", "x torch", ".2f"),
    Column("onnxruntime", "x ONNX Runtime", ".2f"),
    Column("openvino", "x OpenVINO", ".2f"),
    Column(ORIGINAL, "x the dense network in ONNX Runtime", ".2f"),
    Column("layers", "pruned layers alone, x torch", ".2f"),
)
PRUNED = 0.3  # a layer with fewer zeros was not pruned


@dataclass(frozen=True)
class Case:
    """A method and the network that it prunes.

    Attributes:
        method: Slug.
        model: Registered name.
        pattern: What is zero together.
        sparsity: Of the pruned layers.
        floor: What one thread must reach over the dense engines, for the pattern; of N:M patterns
            the pruned layers over torch.
    """

    method: str
    model: str
    pattern: str
    sparsity: float
    floor: float | None

    @property
    def name(self) -> str:
        """As the command line takes it."""
        return self.method

    @property
    def by_layers(self) -> bool:
        """Whether the floor is of the pruned layers alone."""
        return self.pattern[0].isdigit()

    @property
    def rewrites(self) -> bool:
        """Whether the method puts another network in this one's place."""
        return isinstance(METHODS[self.method], RewritingMethod)


def _case(slug: str) -> Case:
    special = {
        "a-priori-compression": Case(slug, "resnet50", UNSTRUCTURED, 0.5, None),
        "sparse-ift": Case(slug, "mobilenet_v2", UNSTRUCTURED, 0.75, None),
        "sparsebytenn": Case(slug, "mobilenet_v1", GROUPS, 0.9, 3.0),
        "sparse-then-prune": Case(slug, "vit_small_patch16_224", UNSTRUCTURED, 0.9, 2.3),
        "gpusq-vit": Case(slug, "vit_small_patch16_224", "2:4", 0.5, 1.1),
        "progressive-gradient-flow": Case(slug, "vit_small_patch16_224", "1:4", 0.75, 2.1),
        "bdwp": Case(slug, "vit_small_patch16_224", "2:8", 0.75, 2.1),
    }
    return special.get(slug, Case(slug, "mobilenet_v2", UNSTRUCTURED, 0.85, 2.0))


CASES = tuple(sorted(map(_case, METHODS), key=lambda case: case.model))


# Pruning


def fresh(case: Case, seed: int = 0) -> nn.Module:
    """The network with initial weights."""
    torch.manual_seed(seed)
    network = models.create_model(case.model)
    compress.vary_norms(network)
    return network


def start(case: Case) -> nn.Module:
    """What the method is given: a trained network, where it wants one and there is one."""
    weights = networks.trained_weights(networks.Case(case.model, 1, case.sparsity, 1, 0.0))
    if METHODS[case.method].from_scratch or weights is None:
        return fresh(case)
    return models.create_model(case.model, checkpoint_path=weights)


def rewritten(case: Case, network: nn.Module) -> nn.Module:
    """What the method puts in the network's place."""
    method = METHODS[case.method]
    if not isinstance(method, RewritingMethod):
        return network
    torch.manual_seed(0)
    return method.rewrite(network, method.proposes(network), case.sparsity)


def batches(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise with labels, always the same."""
    generator = torch.Generator().manual_seed(1)
    side = PIXELS if "vit" in case.model else SMALL_PIXELS
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, side, side, generator=generator)
        yield images, torch.randint(1000, (BATCH,), generator=generator)


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), LEARNING_RATE, momentum=0.9)


def targets(case: Case, network: nn.Module) -> tuple[str, ...]:
    """Names of the weights that the method prunes."""
    method = METHODS[case.method]
    if isinstance(method, RewritingMethod):
        return method.masked(network)
    return pruned_parameters(network, case.pattern, proposed=method.proposes(network))


def prune(case: Case) -> nn.Module:
    """The network as the method leaves it, in evaluation mode."""
    method, network = METHODS[case.method], start(case)
    sparse = pruning.prune(
        network,
        case.method,
        case.sparsity,
        pattern=case.pattern,
        include=method.proposes(network) if case.rewrites else (),
        data=list(batches(case)),
        optimizer=optimizer_of,
        fresh=partial(fresh, case),
        score=lambda network: 0.0,  # of noise
        updates=UPDATES,
    )
    return sparse.requires_grad_(False)


def pruned(case: Case, folder: Path) -> nn.Module:
    """The same, kept in a folder."""
    file = folder / f"{case.method}.safetensors"
    if file.exists():
        network = rewritten(case, fresh(case)).eval().requires_grad_(False)
        return aerogel.load(file, network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of methods on how few steps they have
        network = prune(case)
    aerogel.save(network, file)
    return network


# Measuring


class Peers:
    """The dense engines, ready to be called; kept for all methods on one network."""

    def __init__(self, setup: Setup, workspace: Any) -> None:
        self._setup, self._workspace = setup, workspace
        self._model, self._calls = "", {}

    def of(self, case: Case, network: nn.Module, inputs: bench.Inputs) -> dict[str, Any]:
        """Of the dense network, and of the network itself where a method made another one."""
        if case.rewrites:
            dense = fresh(case).eval().requires_grad_(False)
            calls = self._prepared(network, inputs, PEERS)
            original = self._prepared(dense, inputs, (ONNX,))
            return calls | dict(zip((ORIGINAL,), original.values(), strict=False))
        if case.model != self._model:
            self._calls = self._prepared(network, inputs, PEERS)  # they gain nothing from zeros
            self._model = case.model
        return self._calls

    def _prepared(
        self, network: nn.Module, inputs: bench.Inputs, engines: Sequence[bench.Engine]
    ) -> dict[str, Any]:
        threads = self._setup.threads
        return {
            engine.name: engine.prepare(network, inputs, threads, self._workspace)
            for engine in engines
            if engine.available() is None
        }


def row_of(case: Case, setup: Setup, network: nn.Module, peers: Peers) -> dict[str, Any]:
    """Everything that is measured of one case."""
    inputs = bench.Inputs.of(torch.randn(1, 3, PIXELS, PIXELS))
    compiled = aerogel.compile(network, inputs.args, threads=setup.threads)
    explained = compiled.explain()
    if setup.options.explain:
        print(f"\n{case.name}\n{explained}\n", file=sys.stderr)
    calls = {OURS: lambda: compiled(*inputs.args), **peers.of(case, network, inputs)}
    samples = networks.take_turns(calls, setup.threads, setup.rounds * setup.sweeps)
    seconds = statistics.median(samples[OURS])
    whole = networks.operations(fresh(case).eval(), inputs)
    work = networks.operations(network, inputs)
    return {
        "method": case.method,
        "network": case.model,
        "pattern": case.pattern,
        **shares(case, network, inputs, whole),
        "left": work / whole,
        "ms": 1e3 * seconds,
        "of_limit": 1e-9 * work / setup.roof.fma_gflops / seconds,
        "error": networks.relative_error(compiled(*inputs.args), network(*inputs.args)),
        "layers": layers_over_torch(explained) if case.by_layers else None,
        **{name: harness.ratio(taken, samples[OURS]) for name, taken in samples.items()},
    }


def shares(case: Case, network: nn.Module, inputs: bench.Inputs, whole: int) -> dict[str, Any]:
    """Zeros of the pruned layers, and the multiply-adds that as many leave if spread evenly."""
    pruned = targets(case, network)
    if not pruned:
        return {"zeros": 0.0, "even": None}
    masks = {name: network.get_parameter(name) != 0 for name in pruned}
    twin = copy.deepcopy(network)
    for name in pruned:
        twin.get_parameter(name).fill_(1.0)
    full = networks.operations(twin, inputs)
    for name in pruned:
        twin.get_parameter(name).zero_()
    rest = networks.operations(twin, inputs)
    kept = sum(int(masks[name].sum()) for name in pruned)
    density = kept / sum(masks[name].numel() for name in pruned)
    return {"zeros": 1 - density, "even": (rest + density * (full - rest)) / whole}


def layers_over_torch(explained: Any) -> float:
    """How many times faster than dense torch the pruned layers are together."""
    pruned = [row for row in explained.rows if row.sparsity > PRUNED]
    sparse = sum(row.seconds_sparse or row.seconds_dense for row in pruned)
    return sum(row.seconds_dense for row in pruned) / sparse


def figure_of(case: Case, row: dict[str, Any]) -> Figure | None:
    """What the method is held to."""
    name = f"{case.method}: {case.model}, {row['zeros']:.0%} zeros, {case.pattern}"
    if case.rewrites:
        if TORCH.name not in row:
            return None
        return Figure(name, row[TORCH.name], "x eager torch on this network", 1.0)
    floor = case.floor * min(1.0, row["even"] / row["left"]) if case.floor else None
    floor = None if floor is None else round(floor, 2)
    if case.by_layers:
        return Figure(name, row["layers"], "x dense torch, the pruned layers", floor)
    engines = [each.name for each in PEERS if each.name in row]
    against = min(engines, key=row.__getitem__) if "vit" in case.model else ONNX.name
    return Figure(name, row[against], f"x {against} (dense)", floor) if against in row else None


def measure(setup: Setup) -> Findings:
    rows: list[dict[str, Any]] = []
    figures: list[Figure] = []
    with bench.Workspace() as workspace, torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(setup.options.networks or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        peers = Peers(setup, workspace)
        for case in networks.wanted(CASES, setup):
            row = row_of(case, setup, pruned(case, folder), peers)
            rows.append(row)
            figure = figure_of(case, row)
            figures += [] if figure is None else [figure]
    return Findings(COLUMNS, rows, figures)


def add_options(parser: argparse.ArgumentParser) -> None:
    networks.add_options(parser, CASES)
    parser.add_argument("--networks", metavar="DIR", help="where pruned networks are kept")


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=3, quick_rounds=3, options=add_options))
