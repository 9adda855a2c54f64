"""MobileNetV1 at 224 with 90 % of its 1x1 weights zero: one native plan against dense engines.

    python benchmarks/plan.py [--sparsity 0.9] [--block 1|2|4] [--batch 1] [--threads 1]

Engines are run in turn, round by round, in one process, so that a busy machine slows all of them
alike; printed are medians and the median of the rounds' ratios. With one thread the time is the
process's CPU time, which other processes do not enter; with several it is wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from aerogel import kernels
from aerogel.kernels import BlockRowWeight, Plan, PlanBuilder, SpmmVariant, Value

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


def compare(engines: dict[str, Callable[[], object]], threads: int, rounds: int) -> None:
    """Prints medians and ratios of interleaved rounds."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds + 1):
        for name, engine in engines.items():
            begin = clock()
            engine()
            times[name].append(clock() - begin)
    ours = times["aerogel"][1:]
    print(f"{'engine':<14}{'median ms':>10}{'best ms':>9}{'aerogel is':>12}")
    for name, all_seconds in times.items():
        seconds = all_seconds[1:]
        ratio = statistics.median(s / o for s, o in zip(seconds, ours, strict=True))
        median = 1e3 * statistics.median(seconds)
        print(f"{name:<14}{median:>10.2f}{1e3 * min(seconds):>9.2f}{ratio:>11.2f}x")


def print_profile(plan: Plan, image: Tensor, threads: int) -> None:
    """Prints seconds, speed and share of the measured FMA peak of every step."""
    peak = kernels.roofline(threads).fma_gflops
    rows = {row.name: row for row in plan.describe()}
    steps = plan.profile([image], repeats=15)
    total = sum(seconds for _, seconds in steps)
    print(f"\npeak {peak:.0f} GF/s, arena {plan.arena_bytes / 2**20:.1f} MiB")
    print(f"{'step':<16}{'output':>16}{'us':>8}{'%':>6}{'GF/s':>7}{'% peak':>8}{'GB/s':>7}")
    by_kind: dict[str, float] = {}
    for name, seconds in steps:
        row = rows.get(name)
        kind = name.split("_")[0]
        by_kind[kind] = by_kind.get(kind, 0.0) + seconds
        share = f"{1e6 * seconds:>8.0f}{100 * seconds / total:>6.1f}"
        if row is None:
            print(f"{name:<16}{'':>16}{share}")
            continue
        speed = 1e-9 * row.flops * plan.batch / seconds
        gbps = 1e-9 * row.bytes * plan.batch / seconds
        output = "x".join(map(str, row.output_shape))
        print(f"{name:<16}{output:>16}{share}{speed:>7.1f}{100 * speed / peak:>8.1f}{gbps:>7.1f}")
    kinds = ", ".join(f"{kind} {1e3 * seconds:.2f}" for kind, seconds in by_kind.items())
    print(f"total {1e3 * total:.2f} ms: {kinds}")


def main() -> None:
    """Builds, checks, times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--block", type=int, default=1, choices=(1, 2, 4))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only-plan", action="store_true", help="no other engines")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    network = make_network()
    prune(network, args.sparsity, args.block)
    image = torch.randn(args.batch, *IMAGE)
    plan = build_plan(network, args.batch, args.threads, args.block, tune(network, args, image))
    with torch.inference_mode():
        expected = network(image)
        error = (plan.run([image])[0] - expected).abs().max() / expected.abs().max()
        print(f"isa {kernels.isa()}, batch {args.batch}, threads {args.threads}")
        print(f"sparsity {args.sparsity}, block {args.block}, relative error {error:.1e}")
        if not args.only_plan:
            engines: dict[str, Callable[[], object]] = {
                "aerogel": lambda: plan.run([image]),
                "torch eager": lambda: network(image),
            }
            onnx = onnx_engine(network, image, args.threads)
            if onnx is None:
                print("onnxruntime: not installed")
            else:
                engines["onnxruntime"] = onnx
            compare(engines, args.threads, args.rounds)
    print_profile(plan, image, args.threads)


if __name__ == "__main__":
    main()
