"""Which nodes may run as one call, and putting that call into the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from aerogel.runtime import ops
from aerogel.runtime.capture import capture
from aerogel.runtime.passes import simplify
from aerogel.runtime.segments import (
    EITHER,
    SEQUENCES,
    SPATIAL,
    TOKENS,
    Segment,
    extract,
    partition,
    substitute,
)

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self, forward: Any, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layers, x)


def graph_of(forward: Any, x: Tensor) -> fx.GraphModule:
    return simplify(capture(Net(forward).eval(), (x,), {}).graph_module)


def known(node: fx.Node) -> str | None:
    if node.target is ops.linear:
        return TOKENS
    return EITHER if node.target in (aten.add.Tensor, aten.mul.Tensor) else None


X = torch.randn(2, 5, 6)
CHAIN = lambda l, x: l[2](l[1](l[0](x)))  # noqa: E731
AROUND = lambda l, x: (y := l[0](x)) * l[1](torch.tanh(y))  # noqa: E731
FORK = lambda l, x: (l[0](x), l[1](x), l[2](x))  # noqa: E731
BETWEEN = lambda l, x: l[1](torch.tanh(l[0](x)))  # noqa: E731


def names(segments: list[Segment]) -> list[int]:
    return [len(segment.layers) for segment in segments]


def test_a_chain_is_one_segment() -> None:
    (segment,) = partition(graph_of(CHAIN, X), known)
    assert len(segment.layers) == 3
    assert len(segment.inputs) == len(segment.outputs) == 1


def test_a_segment_never_waits_for_itself() -> None:
    segments = partition(graph_of(AROUND, X), known)
    assert names(segments) == [1, 1]


def test_readers_of_one_value_share_a_segment() -> None:
    (segment,) = partition(graph_of(FORK, X), known)
    assert len(segment.outputs) == 3
    assert len(segment.inputs) == 1


def test_readers_that_depend_on_each_other_outside_do_not_share() -> None:
    forward = lambda l, x: l[1](torch.tanh(l[0](x)) + x) + l[2](x)  # noqa: E731
    for segment in partition(graph_of(forward, X), known):
        assert_convex(segment)


def assert_convex(segment: Segment) -> None:
    inside, seen = set(segment.nodes), set()
    pending = [user for node in segment.nodes for user in node.users if user not in inside]
    while pending:
        node = pending.pop()
        assert node not in inside
        if node not in seen:
            seen.add(node)
            pending.extend(node.users)


@pytest.mark.parametrize("demand", [SEQUENCES, SPATIAL])
def test_the_strictest_demand_of_its_nodes_decides_for_a_segment(demand: str) -> None:
    gm = graph_of(CHAIN, X)
    first = next(node for node in gm.graph.nodes if node.target is ops.linear)
    (segment,) = partition(gm, lambda node: demand if node is first else known(node))
    assert segment.family == demand


@pytest.mark.parametrize("demand", [SEQUENCES, SPATIAL])
def test_values_of_another_batch_stay_out_of_a_segment_over_images(demand: str) -> None:
    gm = graph_of(lambda l, x: l[1](l[0](x)[:, 1:].flatten(0, 1)), X)
    first = next(node for node in gm.graph.nodes if node.target is ops.linear)

    def family_of(node: fx.Node) -> str | None:
        if node is first:
            return demand
        moves = (aten.slice.Tensor, aten.flatten.using_ints)
        return EITHER if node.target in moves else known(node)

    assert names(partition(gm, family_of)) == [1, 1]


def test_pieces_without_a_layer_are_left_to_torch() -> None:
    assert partition(graph_of(lambda l, x: x + x, X), known) == []


@pytest.mark.parametrize("forward", [CHAIN, AROUND, FORK, BETWEEN])
def test_extracted_and_substituted_segments_give_the_same(forward: Any) -> None:
    gm = graph_of(forward, X)
    segments = partition(gm, known)
    modules = [_as_call(extract(gm, segment)) for segment in segments]
    replaced = substitute(gm, segments, modules)
    assert not [node for node in replaced.graph.nodes if node.target is ops.linear]
    for ours, theirs in zip(replaced(X), gm(X), strict=True):
        assert torch.equal(ours, theirs)


def _as_call(alone: fx.GraphModule) -> nn.Module:
    class Call(nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            results = alone(*inputs)
            return results if len(results) > 1 else results[0]

    return Call()


def test_the_graph_is_left_alone() -> None:
    gm = graph_of(CHAIN, X)
    before = gm.code
    segments = partition(gm, known)
    substitute(gm, segments, [nn.Identity() for _ in segments])
    assert gm.code == before
