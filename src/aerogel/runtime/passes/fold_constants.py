"""Compute once what depends on weights alone: position ids, masks, transposed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from aerogel.runtime import graph

# A folded tensor may be this much larger than everything it was made from; an expanded mask
# or a broadcast weight is cheaper to recompute than to keep.
_MAX_GROWTH = 4
_SMALL = 1 << 16


def fold_constants(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace every deterministic operator without a run-time input by its value."""
    gm = graph.clone(gm)
    known: dict[fx.Node, Tensor] = {}
    for node in gm.graph.nodes:
        tensor = graph.constant(gm, node)
        if tensor is not None:
            known[node] = tensor
        elif _is_foldable(node) and all(source in known for source in node.all_input_nodes):
            result = _evaluate(node, known)
            if isinstance(result, Tensor) and _worth_keeping(node, result, known):
                known[node] = result
    for node in _frontier(gm, known):
        _materialise(gm, node, known[node])
    return graph.tidy(gm)


def _is_foldable(node: fx.Node) -> bool:
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _evaluate(node: fx.Node, known: dict[fx.Node, Tensor]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: known[source])
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _worth_keeping(node: fx.Node, result: Tensor, known: dict[fx.Node, Tensor]) -> bool:
    sources = sum(known[source].numel() for source in node.all_input_nodes)
    return result.numel() <= max(_SMALL, _MAX_GROWTH * sources)


def _frontier(gm: fx.GraphModule, known: dict[fx.Node, Tensor]) -> list[fx.Node]:
    """Known operators that something unknown reads; the ones behind them vanish as dead code."""
    return [
        node
        for node in gm.graph.nodes
        if node in known and node.op != "get_attr" and any(user not in known for user in node.users)
    ]


def _materialise(gm: fx.GraphModule, node: fx.Node, result: Tensor) -> None:
    # Views of a weight become tensors of their own, laid out as the operators after them see it.
    constant = graph.add_constant(gm, f"folded_{node.name}", result.clone(), node)
    sources = [source.meta.get("fqn") for source in node.all_input_nodes]
    if len(sources) == 1 and sources[0]:
        constant.meta["fqn"] = sources[0]
    node.replace_all_uses_with(constant, delete_user_cb=lambda user: user.op != "output")
