"""Write in-place operators as functional ones where nobody can tell the difference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from aerogel.runtime import graph


def remove_mutation(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace relu_(conv(x)) and its like by relu(conv(x)).

    Only where the tensor written to is the fresh result of an operator and is read by nothing
    else. `mutates` tells whether anything is left.
    """
    gm = graph.clone(gm)
    for node in list(gm.graph.nodes):
        target = _functional(node) if is_mutable(node) else None
        if target is not None and _is_private(node):
            node.target = target
    return graph.tidy(gm)


def mutates(gm: fx.GraphModule) -> bool:
    """Whether any operator of the graph writes to its arguments."""
    return any(is_mutable(node) for node in gm.graph.nodes)


def is_mutable(node: fx.Node) -> bool:
    """Whether the node writes to one of its arguments."""
    target: Any = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _functional(node: fx.Node) -> Any:
    """The operator of the same name without the underscore and with the same arguments."""
    target: Any = node.target
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").rstrip("_"), None)
    found = getattr(packet, target._overloadname, None)
    if found is None or found._schema.is_mutable:
        return None
    names = [argument.name for argument in target._schema.arguments]
    return found if [argument.name for argument in found._schema.arguments] == names else None


def _is_private(node: fx.Node) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node) or graph.only_user(source) is not node:
        return False
    if not _is_fresh(source):
        return False
    # Written in place, a result is cast to the type of what it replaces.
    written = graph.value(source)
    operands = [graph.value(each) for each in node.all_input_nodes]
    same = all(each.dtype == written.dtype for each in operands if isinstance(each, Tensor))
    return same and graph.shape(source) == graph.shape(node)


def _is_fresh(source: fx.Node) -> bool:
    target: Any = source.target
    if source.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return all(result.alias_info is None for result in target._schema.returns)
