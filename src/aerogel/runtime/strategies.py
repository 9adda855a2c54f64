"""Whole-model contenders: each is built, checked against the original, and timed end to end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from aerogel import kernels
from aerogel.runtime import graph
from aerogel.runtime.lowering import (
    Piece,
    alternatives,
    call_pieces,
    lower,
    native_segments,
    plan_piece,
)
from aerogel.runtime.native import PlanModule
from aerogel.runtime.segments import Segment
from aerogel.runtime.timing import Measure, Race, timed
from aerogel.runtime.tuner import Tuned
from aerogel.runtime.tuning_cache import TuningCache

EAGER, TORCH, CALLS, PLANS, MIXED = (
    "eager torch",
    "fused torch",
    "layer calls",
    "native plans",
    "measured pieces",
)
_SECONDS_PER_SEGMENT = 0.5
# A thread that is left free is worth more than a difference which the next run may not show.
_WORTH_A_THREAD = 0.03


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to run the whole model.

    Attributes:
        name: One of the strategy names.
        run: Flat leaves -> tuple of flat outputs.
        pieces: What replaced parts of the fused graph.
    """

    name: str
    run: Callable[..., Any]
    pieces: list[Piece] = field(default_factory=list)


def fastest(seconds: Mapping[str, float]) -> str:
    """The winner; the original model wins a tie."""
    return min(seconds, key=lambda name: (seconds[name], name != EAGER))


def deviation(result: Any, expected: Any) -> float:
    """Largest difference of any tensor, relative to the largest finite magnitude in it.

    NaN and infinity must stand in the same places; else, or if anything that is not a float
    tensor differs, the deviation is infinite.
    """
    ours, theirs = pytree.tree_leaves(result), pytree.tree_leaves(expected)
    if len(ours) != len(theirs):
        return float("inf")
    return max((_leaf_deviation(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _leaf_deviation(ours: Any, theirs: Any) -> float:
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        return 0.0 if type(ours) is type(theirs) and ours == theirs else float("inf")
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    if theirs.numel() == 0:
        return 0.0
    difference, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if math.isfinite(difference) and math.isfinite(scale):
        return difference / max(scale, 1e-30)
    finite = theirs.isfinite()
    same_elsewhere = torch.equal(
        ours[~finite].nan_to_num(nan=0.5), theirs[~finite].nan_to_num(nan=0.5)
    )
    if not same_elsewhere or not bool(ours[finite].isfinite().all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    scale = float(theirs[finite].abs().max())  # NaN or infinity where they belong: the rest counts
    return float((ours[finite] - theirs[finite]).abs().max()) / max(scale, 1e-30)


def flaw_of(run: Callable[[], Any], expected: Any, tolerance: float) -> str | None:
    """Why a contender must not be used, or None if it gives what is expected."""
    try:
        off = deviation(run(), expected)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"fails on the example: {error}"
    return None if off <= tolerance else f"outputs differ by {off:.1e} on the example"


class Strategist:
    """Builds the contenders for one captured graph.

    Args:
        fused: The graph after all passes.
        tuned: Its layers with their measurements.
        leaves: The example, flat.
        threads: For native plans; None follows torch's setting at every call.
        tolerance: Largest deviation allowed.
        measure: Times callables against each other.
        race: The same by their better rounds.
        cache: Remembers how the ways to run a segment compare.
    """

    def __init__(
        self,
        fused: fx.GraphModule,
        tuned: Mapping[fx.Node, Tuned],
        leaves: list[Any],
        *,
        threads: int | None,
        tolerance: float,
        measure: Measure,
        race: Race,
        cache: TuningCache,
    ) -> None:
        self._fused, self._tuned, self._leaves = fused, tuned, leaves
        self._threads, self._tolerance = threads, tolerance
        self._measure, self._race, self._cache = measure, race, cache
        self.notes: list[str] = []

    def contenders(self) -> list[Contender]:
        """Everything worth timing end to end besides the original model."""
        found = [Contender(TORCH, self._fused.forward)]
        calls = call_pieces(self._tuned, self._tuned)
        if calls:
            found.append(self._contender(CALLS, calls))
        plans = self._plans()
        if any(piece.planned for piece in plans):
            found.append(self._contender(PLANS, plans))
        mixed = self._mixed()
        if any(piece.planned for piece in mixed) and not _same_pieces(mixed, plans):
            found.append(self._contender(MIXED, mixed))
        self._cache.flush()
        return found

    def _contender(self, name: str, pieces: list[Piece]) -> Contender:
        return Contender(name, _shortest_call(lower(self._fused, pieces)), pieces)

    def _plans(self) -> list[Piece]:
        """Everything native that can be, the other layers as they are fastest."""
        pieces = []
        segments = native_segments(self._fused, self._tuned, only_where_it_pays=False)
        values = record(self._fused, self._leaves, [s for each in segments for s in each.inputs])
        for segment in segments:
            try:
                pieces.append(plan_piece(segment, self._tuned, self._threads))
            except (ValueError, NotImplementedError) as error:
                self._note(segment, f"no native plan: {error}")
                continue
            self._settle_threads(pieces[-1], [values[source] for source in segment.inputs])
        return self._with_calls_elsewhere(pieces)

    def _mixed(self) -> list[Piece]:
        """Each segment the way that was measured to be fastest, values in and out included."""
        segments = native_segments(self._fused, self._tuned, only_where_it_pays=True)
        values = record(self._fused, self._leaves, [s for each in segments for s in each.inputs])
        pieces: list[Piece] = []
        settled: set[fx.Node] = set()
        for segment in segments:
            inputs = [values[source] for source in segment.inputs]
            pieces += self._best_for(segment, inputs)
            settled.update(segment.layers)
        rest = [node for node in self._tuned if node not in settled]
        return pieces + call_pieces(rest, self._tuned)

    def _best_for(self, segment: Segment, inputs: list[Any]) -> list[Piece]:
        try:
            ways = alternatives(self._fused, segment, self._tuned, self._threads)
        except (ValueError, NotImplementedError) as error:
            self._note(segment, f"no native plan: {error}")
            return call_pieces(segment.layers, self._tuned)
        for piece in ways["plan"][1]:
            self._settle_threads(piece, inputs)
        expected = ways["torch"][0](*inputs)
        for name in [name for name in ways if name != "torch"]:
            flaw = flaw_of(partial(ways[name][0], *inputs), expected, self._tolerance)
            if flaw is not None:
                self._note(segment, f"{name} rejected: {flaw}")
                del ways[name]
        key = self._cache.key("segment", segment.family, self._signature(segment))
        seconds = self._cache.get(key, ways)
        if seconds is None:
            runs = {name: partial(module, *inputs) for name, (module, _) in ways.items()}
            seconds = self._measure(runs, _SECONDS_PER_SEGMENT)
            self._cache.put(key, seconds)
        return ways[min(seconds, key=lambda name: seconds[name])][1]

    def _settle_threads(self, piece: Piece, inputs: list[Any]) -> None:
        """Let a plan use its threads as was measured to be fastest: small ones gain from none."""
        assert isinstance(piece.module, PlanModule)
        plan = piece.module.plan
        ways = {str(way): way for way in plan.ways()}
        if len(ways) == 1:
            return

        def run(way: kernels.Way) -> None:
            plan.way = way
            piece.module(*inputs)

        segment = piece.segment
        key = self._cache.key("threads", segment.family, self._signature(segment))
        seconds = self._cache.get(key, ways)
        if seconds is None:
            runs = {name: timed(partial(run, way)) for name, way in ways.items()}
            try:
                seconds = self._race(runs, _SECONDS_PER_SEGMENT)
            except (RuntimeError, ValueError, TypeError):
                return  # who compares its outputs will find that it fails
            self._cache.put(key, seconds)
        enough = (1 + _WORTH_A_THREAD) * min(seconds.values())
        plan.way = next(way for name, way in ways.items() if seconds[name] <= enough)
        if plan.way.most_threads is not None:
            self._note(segment, f"more than {plan.way} gain nothing")

    def _signature(self, segment: Segment) -> list[Any]:
        signature: list[Any] = []
        for node in segment.nodes:
            if node in self._tuned:
                signature.append(self._tuned[node].layer.signature())
            else:
                signature.append([str(node.target), list(graph.shape(node))])
        return signature

    def _with_calls_elsewhere(self, pieces: list[Piece]) -> list[Piece]:
        planned = {node for piece in pieces for node in piece.segment.nodes}
        rest = [node for node in self._tuned if node not in planned]
        return pieces + call_pieces(rest, self._tuned)

    def _note(self, segment: Segment, text: str) -> None:
        names = [self._tuned[node].layer.name for node in segment.layers if node in self._tuned]
        where = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
        self.notes.append(f"{where}: {text}")


def _shortest_call(gm: fx.GraphModule) -> Callable[..., Any]:
    """A graph that is one plan from inputs to outputs needs no graph to be called."""
    *inputs, call, output = gm.graph.nodes
    if all(node.op == "placeholder" for node in inputs) and call.op == "call_module":
        module = gm.get_submodule(str(call.target))
        whole = call.args == tuple(inputs) and output.args == ((call,),)
        if isinstance(module, PlanModule) and whole:
            return module.run
    return gm.forward


def _same_pieces(some: list[Piece], others: list[Piece]) -> bool:
    return {(p.planned, p.segment.nodes) for p in some} == {
        (p.planned, p.segment.nodes) for p in others
    }


def record(gm: fx.GraphModule, leaves: list[Any], nodes: list[fx.Node]) -> dict[fx.Node, Any]:
    """Run the graph and keep the values of some nodes."""
    recorder = _Recorder(gm, set(nodes))
    with torch.no_grad():
        recorder.run(*leaves)
    return recorder.kept


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(gm)
        self._wanted = wanted
        self.kept: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._wanted:
            self.kept[n] = result
        return result
