"""Views that cancel out vanish; planes that become tokens are named."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from aerogel.runtime import graph, ops
from aerogel.runtime.movement import element_numbers, is_move, origin


def simplify_movement(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace chains of views that end where they began, or turn images into tokens.

    (batch, heads, tokens, size) goes back to the (batch, tokens, features) it was made from, and
    the flattening and transposing behind a patch embedding becomes `ops.to_tokens`.
    """
    gm = graph.clone(gm)
    for node in list(gm.graph.nodes):
        if is_move(node) and not all(is_move(user) for user in node.users):
            _simplify(node)
    return graph.tidy(gm)


def _simplify(node: fx.Node) -> None:
    source = origin(node)
    if not isinstance(graph.value(node), Tensor) or not isinstance(graph.value(source), Tensor):
        return
    before, after = graph.shape(source), graph.shape(node)
    would_leak = source.op != "call_function" and any(user.op == "output" for user in node.users)
    several = node.all_input_nodes[0] is not source
    if after == before and several and not would_leak and _equals(node, source, lambda x: x):
        node.replace_all_uses_with(source)
        return
    tokens = len(before) == 4 and after == (before[0], before[2] * before[3], before[1])
    if tokens and _equals(node, source, ops.to_tokens):
        graph.replace(node, ops.to_tokens, (source,))


def _equals(node: fx.Node, source: fx.Node, expected: object) -> bool:
    numbers = element_numbers(node, source)
    if numbers is None:
        return False
    start = torch.arange(numbers.numel(), dtype=torch.int32).view(graph.shape(source))
    return torch.equal(numbers, expected(start))  # type: ignore[operator]
