"""Cut a graph into pieces that run as one native plan each, and put the plans in their place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx, nn

from aerogel.runtime import graph
from aerogel.runtime.layer import is_layer

# What a plan's values are columns of, from the least to the most that is asked of them. Nodes that
# treat every row alike take anything ("either") or tokens, cut as one likes; attention wants whole
# sequences, and what looks at the pixels of an image wants its images one by one.
EITHER, TOKENS, SEQUENCES, SPATIAL = "either", "tokens", "sequences", "spatial"
_DEMANDS = (EITHER, TOKENS, SEQUENCES, SPATIAL)


@dataclass(frozen=True, eq=False)
class Segment:
    """Nodes that can run as one call: no path leaves them and comes back.

    Attributes:
        nodes: In topological order.
        family: "spatial", "sequences" or "tokens".
    """

    nodes: tuple[fx.Node, ...]
    family: str

    @property
    def inputs(self) -> list[fx.Node]:
        """Values from outside, without weights, in order of first use."""
        inside = set(self.nodes)
        sources = (source for node in self.nodes for source in node.all_input_nodes)
        return list(dict.fromkeys(s for s in sources if s not in inside and s.op != "get_attr"))

    @property
    def outputs(self) -> list[fx.Node]:
        """Values that something outside reads."""
        inside = set(self.nodes)
        return [node for node in self.nodes if any(user not in inside for user in node.users)]

    @property
    def layers(self) -> list[fx.Node]:
        """The layers among the nodes."""
        return [node for node in self.nodes if is_layer(node)]


def partition(gm: fx.GraphModule, family_of: Callable[[fx.Node], str | None]) -> list[Segment]:
    """Maximal convex segments of the accepted nodes, in topological order.

    Args:
        gm: The graph.
        family_of: "spatial", "sequences", "tokens", "either", or None for a node that stays
            outside.

    Returns:
        Segments with at least one layer. Layers over tokens that read the same value (query,
        key, value) share a segment, so that it is brought in once.
    """
    merger = _Merger(gm)
    for node in gm.graph.nodes:
        family = family_of(node)
        if family is None:
            continue
        merger.add(node, family)
        for source in node.all_input_nodes:
            merger.join(node, source)
    for node in gm.graph.nodes:
        readers = [user for user in node.users if merger.family(user) in (TOKENS, SEQUENCES)]
        for first, second in pairwise(readers):
            merger.join(first, second)
    return merger.segments()


class _Merger:
    """Disjoint sets of nodes that stay acyclic when each is seen as one node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._order = {node: index for index, node in enumerate(gm.graph.nodes)}
        self._group: dict[fx.Node, list[fx.Node]] = {}
        self._family: dict[int, str] = {}
        self._own: dict[fx.Node, str] = {}

    def add(self, node: fx.Node, family: str) -> None:
        self._own[node] = family
        self._group[node] = [node]
        self._family[id(self._group[node])] = family

    def family(self, node: fx.Node) -> str | None:
        group = self._group.get(node)
        return None if group is None else self._family[id(group)]

    def join(self, a: fx.Node, b: fx.Node) -> None:
        """Merge the groups of two nodes unless their demands differ or a cycle would arise."""
        first, second = self._group.get(a), self._group.get(b)
        if first is None or second is None or first is second:
            return
        union = [*first, *second]
        family = max(self._family[id(first)], self._family[id(second)], key=_DEMANDS.index)
        if not self._fits(family, union) or self._leaves_and_returns(set(union)):
            return
        first.extend(second)
        self._family[id(first)] = family
        for node in second:
            self._group[node] = first

    def _fits(self, family: str, nodes: list[fx.Node]) -> bool:
        """Whether every node has the images, or the sequences, that a family's plan runs over."""
        if family not in (SPATIAL, SEQUENCES):
            return True
        shapes = [graph.shape(node) for node in nodes]
        if len({shape[0] for shape in shapes}) > 1:
            return False
        if any(len(graph.shape(node)) > 3 and self._own[node] != SPATIAL for node in nodes):
            return False
        return family == SPATIAL or len({s[1] for s in shapes if len(s) == 3}) <= 1

    def _leaves_and_returns(self, union: set[fx.Node]) -> bool:
        pending = [user for node in union for user in node.users if user not in union]
        seen: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node in union:
                return True
            if node in seen:
                continue
            seen.add(node)
            for member in self._group.get(node, [node]):
                seen.add(member)
                pending.extend(member.users)
        return False

    def segments(self) -> list[Segment]:
        groups = {id(group): group for group in self._group.values()}.values()
        found = []
        for group in groups:
            nodes = tuple(sorted(group, key=self._order.__getitem__))
            if any(is_layer(node) for node in nodes):
                family = self._family[id(group)]
                found.append(Segment(nodes, SPATIAL if family == EITHER else family))
        return sorted(found, key=lambda segment: self._order[segment.nodes[0]])


def extract(gm: fx.GraphModule, segment: Segment) -> fx.GraphModule:
    """The segment alone as a module: its inputs in order -> tuple of its outputs."""
    alone = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for source in segment.inputs:
        copies[source] = alone.placeholder(source.name)
        copies[source].meta = dict(source.meta)
    for node in segment.nodes:
        for weight in node.all_input_nodes:
            if weight.op == "get_attr" and weight not in copies:
                copies[weight] = alone.node_copy(weight)
        copies[node] = alone.node_copy(node, copies.__getitem__)
    alone.output(tuple(copies[node] for node in segment.outputs))
    return graph.tidy(fx.GraphModule(gm, alone))


def substitute(
    gm: fx.GraphModule, segments: Sequence[Segment], modules: Sequence[nn.Module]
) -> fx.GraphModule:
    """A copy of the graph in which each segment is one call of its module.

    The module takes the segment's inputs and returns its output, or a tuple of several.
    """
    writer = _Writer(segments)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            writer.write(node)
    for node in gm.graph.nodes:
        writer.write(node)
    result = fx.GraphModule(_with_children(gm, modules), writer.graph)
    return graph.tidy(result)


class _Writer:
    """Copies nodes into a new graph, each after everything it reads."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._home = {
            node: (index, segment)
            for index, segment in enumerate(segments)
            for node in segment.nodes
        }

    def write(self, node: fx.Node) -> None:
        if node in self._copies or (node in self._home and not self._is_read_outside(node)):
            return
        if node in self._home:
            self._write_segment(*self._home[node])
            return
        for source in node.all_input_nodes:
            self.write(source)
        self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)

    def _is_read_outside(self, node: fx.Node) -> bool:
        home = self._home[node][0]
        return any(self._home.get(user, (None,))[0] != home for user in node.users)

    def _write_segment(self, index: int, segment: Segment) -> None:
        for source in segment.inputs:
            self.write(source)
        given = tuple(self._copies[source] for source in segment.inputs)
        call = self.graph.call_module(f"plan_{index}", given)
        outputs = segment.outputs
        if len(outputs) == 1:
            call.meta = dict(outputs[0].meta)
            self._copies[outputs[0]] = call
            return
        for position, node in enumerate(outputs):
            item = self.graph.call_function(operator.getitem, (call, position))
            item.meta = dict(node.meta)
            self._copies[node] = item


def _with_children(gm: fx.GraphModule, modules: Sequence[nn.Module]) -> fx.GraphModule:
    root = graph.clone(gm)
    for index, module in enumerate(modules):
        root.add_submodule(f"plan_{index}", module)
    return root
