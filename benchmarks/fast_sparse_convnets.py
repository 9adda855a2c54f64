"""The networks of "Fast Sparse ConvNets" (arXiv 1911.09723) at 224, and the sum of 1x1 layers.

    python benchmarks/fast_sparse_convnets.py [layers|networks|rules] [--quick] [--threads N]
                                              [--json] [--check] [--save]

*layers*: all 1x1 convolutions of MobileNet v1, each with ReLU6, as often as the network has them.
Dense is the fastest of torch's ways for each layer (with the clamp fused where torch can), sparse
the fastest variant of the packed kernel. The figure is the ratio of the sums.

*networks*: whole networks compiled by `aerogel.runtime.sparsify_convs` against the dense network
with batch norm folded, in eager torch (either memory format) and in ONNX Runtime. MobileNet v2 has
its real ImageNet weights where they can be had.

*rules*: MobileNet v1 at 30 to 90 % zeros: what measuring does and what XNNPACK's rule of two thirds
would do, against the same dense network.

Candidates take turns; see harness.py. One thread is timed by its CPU time, several by the wall
clock. The limit is what the multiply-adds that are left would take at the measured peak.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import harness
from aerogel import bench, data, kernels, models, runtime
from aerogel.models.mobilenet import V1_BLOCKS
from aerogel.pruning.fast_sparse_convnets import block_patterns, select_pointwise
from aerogel.sparsity import build_masks, compute_scores
from harness import OURS, Call, Column, Contest, Figure, Findings, Setup, ratio
from networks import operations
from spmm import random_weight

PARTS = ("layers", "networks", "rules")
STEM_CHANNELS, IMAGE = 32, 224
# (sparsity, block) -> what the sum over the layers must reach on one thread.
LAYER_FLOORS = {(0.9, 1): 2.5, (0.7, 1): 1.2, (0.3, 4): 1.0}
# (network, sparsity, blocks) -> floors against folded eager torch and ONNX Runtime (None: shown).
NETWORKS: dict[tuple[str, float, str | int], tuple[float, float | None]] = {
    ("mobilenet_v1", 0.9, 1): (1.5, 2.6),
    ("mobilenet_v1", 0.9, "12b4"): (1.5, 2.6),
    ("mobilenet_v1", 0.9, 4): (1.5, 3.0),
    ("mobilenet_v2", 0.85, 1): (1.5, 2.0),
    ("mobilenet_v2", 0.85, "11-16b2"): (1.5, 2.0),
    ("efficientnet_b0", 0.8, 1): (1.0, None),
}
NEVER_BELOW = 0.95
RULE_SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.9)

COLUMNS = (
    Column("part", "part"),
    Column("what", "what"),
    Column("zeros", "zeros", ".0%"),
    Column("block", "block"),
    Column("peer", "against"),
    Column("peer_ms", "its ms", ".3f"),
    Column("ours_ms", "ours ms", ".3f"),
    Column("times", "ours is", ".2f"),
    Column("chosen", "chosen"),
)

# A row of the table, or a figure.
Found = Iterator[dict[str, Any] | Figure]


def pointwise_layers() -> dict[tuple[int, int, int], int]:
    """(outputs, inputs, plane side) of MobileNet v1's 1x1 layers -> how often each occurs."""
    found: dict[tuple[int, int, int], int] = {}
    channels, side = [STEM_CHANNELS, *(chs for chs, _ in V1_BLOCKS)], IMAGE // 2
    for (inputs, outputs), (_, stride) in zip(pairwise(channels), V1_BLOCKS, strict=True):
        side //= stride
        found[outputs, inputs, side] = found.get((outputs, inputs, side), 0) + 1
    return found


def dense_calls(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Call]:
    """Torch's ways to compute hardtanh(conv(x), 0, 6)."""
    kernel, planes = weight[:, :, None, None], x.view(x.shape[1], -1)
    last = torch.channels_last
    x_last, kernel_last = x.to(memory_format=last), kernel.to(memory_format=last)

    def fused(x: Tensor, kernel: Tensor) -> Call:
        geometry = ([0, 0], [1, 1], [1, 1], 1)
        return lambda: torch.ops.mkldnn._convolution_pointwise(
            x, kernel, bias, *geometry, "hardtanh", [0.0, 6.0], ""
        )

    calls = {
        "conv2d": lambda: F.hardtanh_(F.conv2d(x, kernel, bias), 0.0, 6.0),
        "channels last": lambda: F.hardtanh_(F.conv2d(x_last, kernel_last, bias), 0.0, 6.0),
        "mm": lambda: F.hardtanh_(torch.addmm(bias[:, None], weight, planes), 0.0, 6.0),
    }
    if torch.backends.mkldnn.is_available():
        calls |= {"fused": fused(x, kernel), "fused, last": fused(x_last, kernel_last)}
    return calls


def sparse_calls(
    x: Tensor, weight: Tensor, bias: Tensor, block: int, threads: int
) -> dict[tuple[int, ...], Call]:
    """Every variant of the packed kernel worth trying."""
    packed = kernels.BlockRowWeight.pack(weight, block)

    def call(variant: kernels.SpmmVariant) -> Call:
        own = packed.without_cache()
        return lambda: kernels.spmm(x, own, bias, activation="relu6", variant=variant)

    variants = kernels.spmm_variants(packed, x.shape[2] * x.shape[3], threads=threads)
    return {tuple(v): call(v) for v in variants}


def compare_layers(setup: Setup) -> Found:
    """Every 1x1 layer, and the sums over the network."""
    for (sparsity, block), floor in LAYER_FLOORS.items():
        sums = {"dense": 0.0, OURS: 0.0}
        flops = 0
        for (outputs, inputs, side), count in pointwise_layers().items():
            weight, bias = random_weight(outputs, inputs, sparsity, block), torch.randn(outputs)
            x = torch.randn(1, inputs, side, side)
            dense = dense_calls(x, weight, bias)
            contest = Contest(dense, sparse_calls(x, weight, bias, block, setup.threads))
            contest.sweep(setup.timer, setup.rounds)
            quickest = contest.fastest(dense)
            sums["dense"] += count * contest.seconds(quickest)
            sums[OURS] += count * contest.seconds()
            flops += count * 2 * int(weight.count_nonzero()) * side * side
            yield {
                "part": "layers",
                "what": f"{count} x {inputs} -> {outputs} @ {side}x{side}",
                "zeros": sparsity,
                "block": f"{block}x1",
                "peer": quickest,
                "peer_ms": 1e3 * contest.seconds(quickest),
                "ours_ms": 1e3 * contest.seconds(),
                "times": contest.times_faster(quickest),
            }
        limit = sums["dense"] / (1e-9 * flops / setup.roof.fma_gflops)
        name = f"1x1 layers of mobilenet_v1 with ReLU6, {sparsity:.0%} zeros in {block}x1"
        unit = "x the fastest dense calls of torch (sums)"
        yield Figure(name, sums["dense"] / sums[OURS], unit, floor, limit=limit)


def network(name: str) -> nn.Module:
    """A network with its real weights if there are any, else with batch norms that do something."""
    if name == "mobilenet_v2":
        try:
            weights = data.fetch_checkpoint(name)
            return models.create_model(name, checkpoint_path=weights).eval()
        except data.FetchError as error:
            print(f"random weights: {error}", file=sys.stderr)
    made = models.create_model(name).eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return made


def folded(model: nn.Module) -> nn.Module:
    """A copy with batch norm folded into the convolutions."""
    model = copy.deepcopy(model)
    for parent in model.modules():
        children = list(parent.named_children())
        for (name, conv), (after, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, after, nn.Identity())
    return model


@torch.no_grad()
def prune(model: nn.Module, sparsity: float, blocks: str | int) -> nn.Module:
    """A copy whose 1x1 weights of smallest magnitude are zero."""
    model = copy.deepcopy(model)
    selection = select_pointwise(model)
    scores = compute_scores(selection, "magnitude")
    build_masks(scores, 1.0 - sparsity, block_patterns(selection, blocks)).apply_(model)
    return model


def dense_engines(
    model: nn.Module, x: Tensor, threads: int, workspace: bench.Workspace
) -> dict[str, Callable[[], object]]:
    """The folded dense network in torch and ONNX Runtime."""
    planes, last = folded(model), folded(model).to(memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last)
    engines: dict[str, Callable[[], object]] = {
        "eager": lambda: planes(x),
        "eager, channels last": lambda: last(x_last),
    }
    peer = bench.OnnxRuntime()
    if peer.available() is None:
        engines[peer.name] = peer.prepare(planes, bench.Inputs.of(x), threads, workspace)
    return engines


def interleave(engines: dict[str, Call], setup: Setup) -> dict[str, list[float]]:
    """Seconds of each round, the first left out; engines may have threads of their own."""
    clock = time.process_time if setup.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(setup.rounds * setup.sweeps + 1):
        for name, engine in engines.items():
            begin = clock()
            engine()
            if number:
                times[name].append(clock() - begin)
    return times


def compare_networks(setup: Setup, workspace: bench.Workspace) -> Found:
    """Whole networks against the folded dense ones."""
    cases = list(NETWORKS.items())[: 1 if setup.quick else None]
    for (name, sparsity, blocks), (eager_floor, onnx_floor) in cases:
        dense = network(name)
        x = torch.randn(1, *models.model_config(name)["input_size"])
        sparse = prune(dense, sparsity, blocks)
        fast = runtime.sparsify_convs(sparse, x, threads=setup.threads)
        engines = dense_engines(dense, x, setup.threads, workspace)
        times = interleave({**engines, OURS: lambda fast=fast, x=x: fast(x)}, setup)
        least = 1e-9 * operations(sparse, bench.Inputs.of(x)) / setup.roof.fma_gflops
        row = {
            "part": "networks",
            "what": name,
            "zeros": sparsity,
            "block": str(blocks),
            "chosen": str(fast.explain().chosen),
        }
        yield from (row | _against(peer, times) for peer in engines)
        eager = min((e for e in engines if e.startswith("eager")), key=lambda e: _median(times[e]))
        for peer, floor in ((eager, eager_floor), ("onnxruntime", onnx_floor)):
            if peer not in times:
                continue
            what = f"{name}, {sparsity:.0%} zeros, blocks {blocks}"
            limit, gain = _median(times[peer]) / least, ratio(times[peer], times[OURS])
            unit = f"x {peer.split(',')[0]}, batch norm folded (dense)"
            yield Figure(what, gain, unit, floor, limit=limit)


def compare_rules(setup: Setup) -> Found:
    """MobileNet v1 at several sparsities: measuring, and the rule, against what was given."""
    dense = network("mobilenet_v1")
    x = torch.randn(1, 3, IMAGE, IMAGE)
    for sparsity in RULE_SPARSITIES[-1:] if setup.quick else RULE_SPARSITIES:
        sparse = prune(dense, sparsity, 1)
        ways: dict[str, Any] = {"measured": "measure", "rule of 2/3": runtime.XNNPACK_THRESHOLD}
        made = {
            way: runtime.sparsify_convs(sparse, x, threads=setup.threads, threshold=threshold)
            for way, threshold in ways.items()
        }
        calls: dict[str, Call] = {way: lambda m=m: m(x) for way, m in made.items()}
        times = interleave({"given": lambda sparse=sparse: sparse(x), **calls}, setup)
        for way, floor in (("measured", NEVER_BELOW), ("rule of 2/3", None)):
            yield {
                "part": "rules",
                "what": f"mobilenet_v1, {way}",
                "zeros": sparsity,
                "block": "1",
                "chosen": str(made[way].explain().chosen),
            } | _against("given", times, way)
            gain = ratio(times["given"], times[way])
            name = f"mobilenet_v1, {sparsity:.0%} zeros, {way}"
            yield Figure(name, gain, "x the given network in eager torch", floor)


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def _against(peer: str, times: dict[str, list[float]], ours: str = OURS) -> dict[str, Any]:
    """The fields of a row that hold times."""
    return {
        "peer": peer,
        "peer_ms": 1e3 * _median(times[peer]),
        "ours_ms": 1e3 * _median(times[ours]),
        "times": ratio(times[peer], times[ours]),
    }


def measure(setup: Setup) -> Findings:
    parts = setup.options.parts or PARTS
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
    found: list[dict[str, Any] | Figure] = []
    with torch.inference_mode():
        if "layers" in parts:
            found += compare_layers(setup)
    with torch.no_grad(), bench.Workspace() as workspace:
        if "networks" in parts:
            found += compare_networks(setup, workspace)
        if "rules" in parts:
            found += compare_rules(setup)
    figures = [one for one in found if isinstance(one, Figure)]
    return Findings(COLUMNS, [one for one in found if isinstance(one, dict)], figures)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "parts", nargs="*", metavar="PART", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}"
    )


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, rounds=11, sweeps=1, options=add_options))
