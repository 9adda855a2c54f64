"""Replace parts of the fused graph by what was found fastest; all the rest stays torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from aerogel.runtime.candidates import Candidate
from aerogel.runtime.candidates.torch_dense import NAME as TORCH
from aerogel.runtime.layer import epilogue, plain_arguments
from aerogel.runtime.native import build_plan, family_of
from aerogel.runtime.segments import EITHER, Segment, extract, partition, substitute
from aerogel.runtime.tuner import Tuned


@dataclass(frozen=True, eq=False)
class Piece:
    """A segment of the graph and the module that takes its place.

    Attributes:
        segment: The nodes replaced.
        module: Takes the segment's inputs, returns its output or a tuple of outputs.
        kernels: The candidate chosen for each layer in it.
        planned: Whether it is a native plan (else one call per layer).
    """

    segment: Segment
    module: nn.Module
    kernels: dict[fx.Node, Candidate]
    planned: bool


class LayerCall(nn.Module):
    """One layer called from torch; brings the segment's inputs into (x, residual)."""

    def __init__(self, module: nn.Module, adds_own_input: bool) -> None:
        super().__init__()
        self._module, self._adds_own_input = module, adds_own_input

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """act(layer(x) + residual)."""
        return self._module(x, x if self._adds_own_input else residual)


def native_segments(
    gm: fx.GraphModule, tuned: Mapping[fx.Node, Tuned], *, only_where_it_pays: bool
) -> list[Segment]:
    """The parts that can run as native plans.

    Args:
        gm: The fused graph.
        tuned: Its layers.
        only_where_it_pays: Leave out layers that dense torch computes faster than any kernel.
    """
    chosen = {
        node: layer.best_planned
        for node, layer in tuned.items()
        if layer.best_planned and (layer.native_pays or not only_where_it_pays)
    }
    return partition(gm, lambda node: family_of(node, chosen))


def plan_piece(segment: Segment, tuned: Mapping[fx.Node, Tuned], threads: int | None) -> Piece:
    """One native plan for a whole segment."""
    kernels = {node: tuned[node].best_planned for node in segment.layers}
    chosen = {node: each for node, each in kernels.items() if each is not None}
    return Piece(segment, build_plan(segment, chosen, threads), chosen, planned=True)


def call_pieces(layers: Iterable[fx.Node], tuned: Mapping[fx.Node, Tuned]) -> list[Piece]:
    """One call per layer for which some kernel beats torch outside a plan."""
    pieces = []
    for node in layers:
        best = tuned[node].best_direct if node in tuned else None
        if best is None or best.name == TORCH or best.module is None:
            continue
        adds_own_input = epilogue(node)[1] is plain_arguments(node)[0]
        call = LayerCall(best.module(), adds_own_input)
        pieces.append(Piece(Segment((node,), EITHER), call, {node: best}, planned=False))
    return pieces


def lower(gm: fx.GraphModule, pieces: list[Piece]) -> fx.GraphModule:
    """The graph with every piece in its place."""
    return substitute(gm, [p.segment for p in pieces], [p.module for p in pieces])


def alternatives(
    gm: fx.GraphModule, segment: Segment, tuned: Mapping[fx.Node, Tuned], threads: int | None
) -> dict[str, tuple[nn.Module, list[Piece]]]:
    """The ways to run one segment: one plan, a call per layer, fused torch.

    Returns:
        Name -> (module taking the segment's inputs, pieces for the whole graph).
    """
    alone = extract(gm, segment)
    found: dict[str, tuple[nn.Module, list[Piece]]] = {"torch": (alone, [])}
    calls = call_pieces(segment.layers, tuned)
    if calls:
        found["calls"] = (_with_calls(alone, segment, calls), calls)
    plan = plan_piece(segment, tuned, threads)
    found["plan"] = (plan.module, [plan])
    return found


def _with_calls(alone: fx.GraphModule, segment: Segment, calls: list[Piece]) -> fx.GraphModule:
    """The extracted segment with the pieces' modules; its layers come in the same order."""
    twin = dict(zip(segment.layers, _layers(alone), strict=True))
    segments = [Segment((twin[piece.segment.nodes[0]],), EITHER) for piece in calls]
    return substitute(alone, segments, [piece.module for piece in calls])


def _layers(gm: fx.GraphModule) -> list[fx.Node]:
    return Segment(tuple(gm.graph.nodes), EITHER).layers
