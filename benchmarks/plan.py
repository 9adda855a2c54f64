"""MobileNetV1 at 224 with 90 % of its 1x1 weights zero: one native plan, step by step.

    python benchmarks/plan.py [--sparsity 0.9] [--block 1|2|4] [--batch 1] [--threads N] [--save]

The plan, eager torch and ONNX Runtime take turns; see harness.py. The table holds the plan's steps
with their speed and their share of the measured peak of multiply-adds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import harness
from aerogel import kernels
from aerogel.kernels import BlockRowWeight, Plan, PlanBuilder, SpmmVariant, Value
from harness import OURS, Column, Contest, Figure, Findings, Setup

IMAGE = (3, 224, 224)
STEM = 32
# (output channels, stride) of the depthwise-separable blocks of arXiv 1704.04861
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)
CLASSES = 1000


def make_network() -> nn.Sequential:
    """MobileNetV1 without batch norm (folded), random weights of a sensible scale."""

    def conv(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Module:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        nn.init.kaiming_normal_(layer.weight)
        return nn.Sequential(layer, nn.ReLU6())

    layers, channels = [conv(IMAGE[0], STEM, 3, 2)], STEM
    for outputs, stride in BLOCKS:
        layers += [conv(channels, channels, 3, stride, channels), conv(channels, outputs, 1, 1)]
        channels = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    return nn.Sequential(*layers, *head).eval()


def prune(network: nn.Sequential, sparsity: float, block: int) -> None:
    """Removes the smallest 1x1 weights (or groups of `block` output channels) of each layer."""
    for layer in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
        if layer.kernel_size != (1, 1):
            continue
        weight = layer.weight.data
        groups = weight.view(weight.shape[0] // block, block, -1)
        scores = groups.abs().sum(1)
        threshold = scores.flatten().kthvalue(int(sparsity * scores.numel())).values
        groups *= (scores > threshold)[:, None]


def build_plan(
    network: nn.Sequential,
    batch: int,
    threads: int,
    block: int,
    variants: dict[str, SpmmVariant] | None = None,
) -> Plan:
    """The network as one plan; `variants` by name of the 1x1 layer."""
    b = PlanBuilder(batch, threads)
    x: Value = b.input(IMAGE)
    for index, (layer, _) in enumerate(m for m in network if isinstance(m, nn.Sequential)):
        weight, bias = layer.weight, layer.bias
        kernel = layer.kernel_size[0]
        if kernel > 1:
            name = "stem" if index == 0 else f"depthwise_{index}"
            x = b.conv2d(
                x, weight, bias, layer.stride, layer.padding, 1, layer.groups, "relu6", name=name
            )
        else:
            name, packed = f"pointwise_{index}", BlockRowWeight.pack(weight.detach(), block)
            variant = (variants or {}).get(name)
            x = b.sparse_conv1x1(x, packed, bias, "relu6", variant=variant, name=name)
    head = network[-1]
    b.output(b.linear(b.global_avg_pool(x, name="mean"), head.weight, head.bias, name="head"))
    return b.build()


def tune(network: nn.Sequential, args: argparse.Namespace, image: Tensor) -> dict[str, SpmmVariant]:
    """The fastest variant of each 1x1 layer, timed in place: all layers change at once."""
    layers = [m[0] for m in network if isinstance(m, nn.Sequential)]
    candidates: dict[str, list[SpmmVariant]] = {}
    plan = build_plan(network, args.batch, args.threads, args.block)
    for row in plan.describe():
        if row.kind == "sparse":
            weight = layers[int(row.name.split("_")[1])].weight.detach()
            packed = BlockRowWeight.pack(weight, args.block)
            columns = row.output_shape[1] * row.output_shape[2]
            found = kernels.spmm_variants(packed, columns)
            candidates[row.name] = found
    best: dict[str, tuple[float, SpmmVariant]] = {}
    for i in range(max(map(len, candidates.values()))):
        chosen = {name: found[min(i, len(found) - 1)] for name, found in candidates.items()}
        plan = build_plan(network, args.batch, args.threads, args.block, chosen)
        for name, seconds in plan.profile([image], repeats=7):
            if name in chosen:
                best[name] = min(best.get(name, (seconds, chosen[name])), (seconds, chosen[name]))
    return {name: variant for name, (_, variant) in best.items()}


def onnx_engine(network: nn.Module, image: Tensor, threads: int) -> Callable[[], object] | None:
    """The network in ONNX Runtime, or None where that is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    program = torch.onnx.export(network, (image,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, feed)


COLUMNS = (
    Column("name", "step"),
    Column("output", "output"),
    Column("us", "us", ".0f"),
    Column("share", "of total", ".1%"),
    Column("gflops", "GFLOP/s", ".1f"),
    Column("fma_share", "of FMA peak", ".0%"),
    Column("gbps", "GB/s", ".1f"),
)


def profile(plan: Plan, image: Tensor, roof: kernels.Roofline) -> list[dict[str, Any]]:
    """A row for every step of the plan."""
    described = {row.name: row for row in plan.describe()}
    steps = plan.profile([image], repeats=15)
    total = sum(seconds for _, seconds in steps)
    rows = []
    for name, seconds in steps:
        row: dict[str, Any] = {"name": name, "us": 1e6 * seconds, "share": seconds / total}
        if (step := described.get(name)) is not None:
            row["output"] = "x".join(map(str, step.output_shape))
            row["gflops"] = 1e-9 * step.flops * plan.batch / seconds
            row["fma_share"] = row["gflops"] / roof.fma_gflops
            row["gbps"] = 1e-9 * step.bytes * plan.batch / seconds
        rows.append(row)
    return rows


def measure(setup: Setup) -> Findings:
    args = setup.options
    network = make_network()
    prune(network, args.sparsity, args.block)
    image = torch.randn(args.batch, *IMAGE)
    plan = build_plan(network, args.batch, args.threads, args.block, tune(network, args, image))
    calls: dict[str, Callable[[], object]] = {OURS: lambda: plan.run([image])}
    notes = []
    with torch.inference_mode():
        expected = network(image)
        error = (plan.run([image])[0] - expected).abs().max() / expected.abs().max()
        if not args.only_plan:
            calls["torch eager"] = lambda: network(image)
            onnx = onnx_engine(network, image, args.threads)
            if onnx is None:
                notes.append("ONNX Runtime is not installed (pip install 'aerogel[bench]').")
            else:
                calls["onnxruntime"] = onnx
        contest = Contest(calls)
        harness.hold([contest], setup)
    notes += [
        f"Relative error of the outputs {error:.1e}; arena {plan.arena_bytes / 2**20:.1f} MiB; "
        + ", ".join(f"{name} {1e3 * contest.seconds(name):.2f} ms" for name in calls)
        + "."
    ]
    what = f"MobileNetV1, {args.sparsity:.0%} zeros in {args.block}x1, batch {args.batch}"
    figures = [
        Figure(what, contest.times_faster(name), f"x {name} dense")
        for name in calls
        if name != OURS
    ]
    return Findings(COLUMNS, profile(plan, image, setup.roof), figures, notes)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--block", type=int, default=1, choices=(1, 2, 4))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--only-plan", action="store_true", help="no other engines")


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, options=add_options))
