"""The networks of "Fast Sparse ConvNets" (arXiv 1911.09723) at 224, and the sum of 1x1 layers.

    python benchmarks/fast_sparse_convnets.py [layers|networks|rules] [--threads N] [--check]

*layers*: all 1x1 convolutions of MobileNet v1, each with ReLU6, as often as the network has them.
Dense is the fastest of torch's ways for each layer (with the clamp fused where torch can), sparse
the fastest variant of the packed kernel. Printed is the ratio of the sums.

*networks*: whole networks compiled by `aerogel.runtime.sparsify_convs` against the dense network
with batch norm folded, in eager torch (either memory format) and in ONNX Runtime. MobileNet v2 has
its real ImageNet weights where they can be had.

*rules*: MobileNet v1 at 30 to 90 % zeros: what measuring does and what XNNPACK's rule of two thirds
would do, against the same dense network.

Candidates take turns, round by round, in one process; medians. One thread is timed by its CPU time,
several by the wall clock.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from aerogel import bench, data, kernels, models, runtime
from aerogel.models.mobilenet import V1_BLOCKS
from aerogel.pruning.fast_sparse_convnets import block_patterns, select_pointwise
from aerogel.sparsity import build_masks, compute_scores
from aerogel.train.allocator import keep_freed_memory
from harness import Call, Timer
from spmm import random_weight

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


def sparse_calls(x: Tensor, weight: Tensor, bias: Tensor, block: int) -> dict[str, Call]:
    """Every variant of the packed kernel worth trying."""
    packed = kernels.BlockRowWeight.pack(weight, block)

    def call(variant: kernels.SpmmVariant) -> Call:
        own = packed.without_cache()
        return lambda: kernels.spmm(x, own, bias, activation="relu6", variant=variant)

    variants = kernels.spmm_variants(packed, x.shape[2] * x.shape[3])
    return {f"sparse {i}": call(v) for i, v in enumerate(variants)}


def compare_layers(timer: Timer, rounds: int) -> list[str]:
    """Prints the sums; returns what is below its floor."""
    missed = []
    for (sparsity, block), floor in LAYER_FLOORS.items():
        dense_sum = sparse_sum = 0.0
        for (outputs, inputs, side), count in pointwise_layers().items():
            weight, bias = random_weight(outputs, inputs, sparsity, block), torch.randn(outputs)
            x = torch.randn(1, inputs, side, side)
            dense, sparse = dense_calls(x, weight, bias), sparse_calls(x, weight, bias, block)
            tuning = timer.rounds(sparse, 3)
            best = min(tuning, key=lambda name: statistics.median(tuning[name]))
            times = timer.rounds({**dense, "sparse": sparse[best]}, rounds)
            medians = {name: statistics.median(each) for name, each in times.items()}
            ours = medians.pop("sparse")
            quickest = min(medians, key=lambda name: medians[name])
            dense_sum += count * medians[quickest]
            sparse_sum += count * ours
            print(
                f"  {count} x {inputs:4d} -> {outputs:4d} @ {side:3d}: {quickest:13s} "
                f"{1e6 * medians[quickest]:6.0f} us, sparse {1e6 * ours:6.0f} us, "
                f"{medians[quickest] / ours:5.2f}x"
            )
        ratio = dense_sum / sparse_sum
        print(f"{sparsity:.0%} zeros, {block}x1: sum {ratio:.2f}x (floor {floor})\n")
        if ratio < floor:
            missed.append(f"layers {sparsity:.0%} {block}x1: {ratio:.2f}x, floor {floor}")
    return missed


def network(name: str) -> nn.Module:
    """A network with its real weights if there are any, else with batch norms that do something."""
    if name == "mobilenet_v2":
        try:
            weights = data.fetch_checkpoint(name)
            return models.create_model(name, checkpoint_path=weights).eval()
        except data.FetchError as error:
            print(f"random weights: {error}")
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


def interleave(engines: dict[str, Call], threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, the first left out."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            begin = clock()
            engine()
            if number:
                times[name].append(clock() - begin)
    return times


def ratio(times: dict[str, list[float]], other: str, ours: str) -> float:
    """Median over the rounds of the other's time by ours."""
    return statistics.median(a / b for a, b in zip(times[other], times[ours], strict=True))


def compare_networks(threads: int, rounds: int, workspace: bench.Workspace) -> list[str]:
    """Prints a line for each network; returns what is below its floor."""
    missed = []
    for (name, sparsity, blocks), (eager_floor, onnx_floor) in NETWORKS.items():
        dense = network(name)
        x = torch.randn(1, *models.model_config(name)["input_size"])
        fast = runtime.sparsify_convs(prune(dense, sparsity, blocks), x, threads=threads)
        engines = dense_engines(dense, x, threads, workspace)
        engines["aerogel"] = lambda fast=fast, x=x: fast(x)
        times = interleave(engines, threads, rounds)
        eager = min(ratio(times, each, "aerogel") for each in times if each.startswith("eager"))
        line = f"{name:16s} {sparsity:.0%} {blocks!s:8s}"
        ours = 1e3 * statistics.median(times["aerogel"])
        print(f"{line} {ours:6.2f} ms, {eager:.2f}x folded eager (floor {eager_floor})", end="")
        if eager < eager_floor:
            missed.append(f"{line}: {eager:.2f}x folded eager, floor {eager_floor}")
        if "onnxruntime" in times:
            onnx = ratio(times, "onnxruntime", "aerogel")
            print(f", {onnx:.2f}x onnxruntime (floor {onnx_floor})", end="")
            if onnx_floor is not None and onnx < onnx_floor:
                missed.append(f"{line}: {onnx:.2f}x onnxruntime, floor {onnx_floor}")
        print(f"; {fast.explain().chosen}", flush=True)
    return missed


def compare_rules(threads: int, rounds: int) -> list[str]:
    """MobileNet v1 at several sparsities; returns where measuring lost time."""
    missed = []
    dense = network("mobilenet_v1")
    x = torch.randn(1, 3, IMAGE, IMAGE)
    for sparsity in RULE_SPARSITIES:
        sparse = prune(dense, sparsity, 1)
        rule = runtime.XNNPACK_THRESHOLD
        measured = runtime.sparsify_convs(sparse, x, threads=threads)
        ruled = runtime.sparsify_convs(sparse, x, threads=threads, threshold=rule)
        engines: dict[str, Call] = {
            "given": lambda sparse=sparse: sparse(x),
            "measured": lambda measured=measured: measured(x),
            "ruled": lambda ruled=ruled: ruled(x),
        }
        with torch.no_grad():
            times = interleave(engines, threads, rounds)
        gains = [ratio(times, "given", each) for each in ("measured", "ruled")]
        print(
            f"{sparsity:.0%} zeros: measured {gains[0]:.2f}x what was given "
            f"({measured.explain().chosen}), rule of 2/3 {gains[1]:.2f}x"
        )
        if gains[0] < NEVER_BELOW:
            missed.append(f"measured at {sparsity:.0%}: {gains[0]:.2f}x, floor {NEVER_BELOW}")
    return missed


def main() -> int:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("layers", "networks", "rules")
    parser.add_argument("parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check", action="store_true", help="exit 1 below a floor (one thread)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
    keep_freed_memory()
    print(f"torch {torch.__version__}, {kernels.isa()}, {options.threads} thread(s)")
    missed: list[str] = []
    with torch.inference_mode():
        if "layers" in options.parts:
            missed += compare_layers(Timer(options.threads, 1e-3), options.rounds)
    with torch.no_grad(), bench.Workspace() as workspace:
        if "networks" in options.parts:
            missed += compare_networks(options.threads, options.rounds, workspace)
        if "rules" in options.parts:
            missed += compare_rules(options.threads, options.rounds)
    for miss in missed:
        print(f"below its floor: {miss}", file=sys.stderr)
    return 1 if missed and options.check and options.threads == 1 else 0


if __name__ == "__main__":
    sys.exit(main())
