"""A GELU that a model or an exporter spells out in sums and products becomes one activation.

It is recognised by what it does: a stretch of element-by-element operators around an erf or a tanh
is run on numbers, and what comes out is compared. So neither the order of the factors nor the place
of a constant matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from aerogel.runtime import graph, ops

aten = torch.ops.aten

_SEEDS = (aten.erf.default, aten.tanh.default)
_POINTWISE = {
    *_SEEDS,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.neg.default,
    aten.square.default,
    aten.pow.Tensor_Scalar,
}
_KINDS = ("gelu", "gelu_tanh")
# Forms differ by 5e-4 from each other, a spelling's rounded constants by 1e-5 at most.
_CLOSE = 5e-5
_SAMPLES = torch.linspace(-8.0, 8.0, 1025, dtype=torch.float64)
_DEEPEST = 8  # operators on a way from x to the erf or tanh, or from there to the result


def name_activations(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite spelled-out GELUs, exact or by tanh, into `ops.activation`."""
    gm = graph.clone(gm)
    wanted = {kind: ops.OUT_OF_PLACE[kind](_SAMPLES) for kind in _KINDS}
    for seed in graph.calls(gm, *_SEEDS):
        found = _recognise(gm, seed, wanted)
        if found is not None:
            result, x, kind = found
            graph.replace(result, ops.activation, (x, kind))
    return graph.tidy(gm)


def _recognise(
    gm: fx.GraphModule, seed: fx.Node, wanted: dict[str, Tensor]
) -> tuple[fx.Node, fx.Node, str] | None:
    """(result, x, kind) of the activation that a seed is part of, if it is one."""
    sources = list(_upstream(seed))
    for result in _downstream(seed):
        for x in sources:
            if graph.shape(x) != graph.shape(result) or not graph.is_float32(x):
                continue
            value = _value(gm, result, {x: _SAMPLES})
            for kind, expected in wanted.items():
                if value is not None and torch.allclose(value, expected, rtol=0.0, atol=_CLOSE):
                    return result, x, kind
    return None


def _upstream(seed: fx.Node) -> Iterator[fx.Node]:
    """What the seed is computed of element by element, the nearest first."""
    reached = [seed]
    for _ in range(_DEEPEST):
        before = [node for each in reached for node in each.all_input_nodes]
        before = [node for node in dict.fromkeys(before) if node.op != "get_attr"]
        yield from before
        reached = [node for node in before if node.target in _POINTWISE]


def _downstream(seed: fx.Node) -> Iterator[fx.Node]:
    """What the seed alone leads to, element by element."""
    node: fx.Node | None = seed
    for _ in range(_DEEPEST):
        node = graph.only_user(node) if node is not None else None
        if node is None or node.target not in _POINTWISE:
            return
        if graph.is_float32(node):
            yield node


def _value(gm: fx.GraphModule, node: Any, known: dict[fx.Node, Tensor]) -> Tensor | None:
    """A node computed from what is known of others; None if that is not enough."""
    if node in known:
        return known[node]
    stored = graph.constant(gm, node)
    if stored is not None:
        return stored.double().reshape(()) if stored.numel() == 1 else None
    if node.target not in _POINTWISE:
        return None
    values = {each: _value(gm, each, known) for each in node.all_input_nodes}
    if any(value is None for value in values.values()):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    known[node] = node.target(*args, **kwargs)
    return known[node]
