"""From a convolutional network with pruned 1x1 layers to a fast one, by measurement or by rule.

The graph is cut into *clusters*: connected parts between the image and the classifier of which
every operator has a kernel on planes (channels first). A cluster is left dense or executed sparse
as a whole, because changing the layout in its midst would cost what the zeros win.

Reference: Elsen, Dukhan, Gale, Simonyan, "Fast Sparse ConvNets", arXiv 1911.09723, and its
implementation in XNNPACK, whose rule is `XNNPACK_THRESHOLD`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import fx, nn

from aerogel.runtime.calls import normalize_example
from aerogel.runtime.capture import frozen_copy
from aerogel.runtime.compiled import CompiledModule
from aerogel.runtime.compiler import Settings, build, check_arguments
from aerogel.runtime.lowering import lower, native_segments, plan_piece
from aerogel.runtime.segments import SPATIAL, Segment
from aerogel.runtime.strategies import Contender
from aerogel.runtime.tuner import Progress, Tuned
from aerogel.runtime.tuning_cache import default_path

MEASURE: Literal["measure"] = "measure"
# A cluster becomes sparse if more than this share of all its 1x1 weights is zero.
XNNPACK_THRESHOLD = 2 / 3
BY_RULE = "sparse clusters"


@dataclass(frozen=True)
class Cluster:
    """A part of the network that runs sparse, or dense, as a whole.

    Attributes:
        layers: names of its 1x1 convolutions over maps.
        weights: their number of weights.
        zeros: how many of these are zero.
    """

    layers: tuple[str, ...]
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros among the 1x1 weights."""
        return self.zeros / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        count = len(self.layers)
        where = f"{self.layers[0]} .. {self.layers[-1]}" if count > 1 else self.layers[0]
        return f"cluster {where}: {self.sparsity:.1%} of {self.weights:,} weights in {count} 1x1"


def sparsify_convs(
    model: nn.Module,
    example_inputs: Any,
    *,
    threshold: float | Literal["measure"] = MEASURE,
    threads: int | None = None,
    tolerance: float = 1e-4,
    cache: bool = True,
    on_progress: Progress | None = None,
) -> CompiledModule:
    """Execute the pruned 1x1 convolutions of a network sparsely, where that pays.

    Batch norm is folded, activations are fused into the layers, the block of each layer (1, 2 or 4
    output channels) follows from its zeros, and every layer is timed as dense torch and as each
    sparse kernel. What is done with that depends on the threshold:

    "measure": whatever is fastest is kept, layer by layer and for the whole network, the original
    included. The result is never slower than what was given, as far as timing can tell.

    A number: XNNPACK's rule without a stop-watch. A cluster of which more than that share of all
    1x1 weights is zero runs as one sparse plan, any other stays dense torch. That says the same on
    every machine, and may be slower where the rule is wrong.

    Args:
        model: Any module on the CPU; left alone.
        example_inputs: One tensor, a tuple of positional inputs, or a dict of keyword inputs.
        threshold: "measure", or a share of zeros in [0, 1]; `XNNPACK_THRESHOLD` is 2/3.
        threads: Of the kernels; by default they follow `torch.get_num_threads()` at every call.
        tolerance: Largest deviation of any output, relative to its largest magnitude.
        cache: Keep measurements in `$AEROGEL_CACHE/tuning.json` (or `~/.cache/aerogel`).
        on_progress: Called with (layer name, layers done, layers in all) while measuring.

    Returns:
        A `CompiledModule`; its `explain()` is the table of layers, with a line for each cluster.

    Raises:
        ValueError: `threshold` out of range, the model cannot be captured as a graph while a rule
            is asked for, or what `aerogel.compile` refuses.
        TypeError: `model` is not a module.

    Reference:
        Elsen et al., arXiv 1911.09723.
    """
    if threshold != MEASURE and not (
        isinstance(threshold, int | float) and 0.0 <= threshold <= 1.0
    ):
        raise ValueError(f"threshold={threshold!r}: expected 'measure' or a share from 0 to 1")
    check_arguments(model, threads, tolerance)
    args, kwargs = normalize_example(example_inputs)
    original = frozen_copy(model.original if isinstance(model, CompiledModule) else model)
    settings = Settings(
        threads=threads,
        tolerance=tolerance,
        cache_path=default_path() if cache else None,
        strategy="fastest" if threshold == MEASURE else BY_RULE,
        on_progress=on_progress,
        extension=partial(by_rule, threshold=threshold, threads=threads),
    )
    return build(original, args, kwargs, settings)


def by_rule(
    fused: fx.GraphModule,
    tuned: Mapping[fx.Node, Tuned],
    *,
    threshold: float | Literal["measure"],
    threads: int | None,
) -> tuple[list[Contender], list[str]]:
    """The contender that runs every cluster above the threshold as one plan, and what was decided.

    Args:
        fused: The simplified graph.
        tuned: Its layers.
        threshold: A share of zeros, or "measure": then there is no contender, only the account.
        threads: Of the plans.
    """
    clusters = find_clusters(fused, tuned)
    if threshold == MEASURE:
        return [], [str(cluster) for cluster, _ in clusters]
    notes, pieces = [], []
    for cluster, segment in clusters:
        if cluster.sparsity > threshold:
            pieces.append(plan_piece(segment, tuned, threads))
            notes.append(f"{cluster}: more than {threshold:.1%}, sparse")
        else:
            notes.append(f"{cluster}: not more than {threshold:.1%}, dense")
    run = lower(fused, pieces).forward if pieces else fused.forward
    return [Contender(BY_RULE, run, pieces)], notes


def find_clusters(
    fused: fx.GraphModule, tuned: Mapping[fx.Node, Tuned]
) -> list[tuple[Cluster, Segment]]:
    """The parts of a simplified graph that hold 1x1 convolutions and can run as one plan each."""
    segments = native_segments(fused, tuned, only_where_it_pays=False)
    found = [(_cluster(s, tuned), s) for s in segments if s.family == SPATIAL]
    return [(cluster, segment) for cluster, segment in found if cluster.layers]


def _cluster(segment: Segment, tuned: Mapping[fx.Node, Tuned]) -> Cluster:
    layers = [tuned[node].layer for node in segment.layers]
    # Linear layers and convolutions of pooled values (squeeze-excite) are no products over pixels.
    pointwise = [
        each for each in layers if each.op == "conv2d" and each.is_pointwise and each.columns > 1
    ]
    return Cluster(
        tuple(each.name for each in pointwise),
        sum(each.weight.numel() for each in pointwise),
        sum(int((each.weight == 0).sum()) for each in pointwise),
    )
