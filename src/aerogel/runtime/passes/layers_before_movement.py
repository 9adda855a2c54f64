"""What treats every token alike goes before the views that only rearrange tokens.

Exporters flatten (batch, tokens, features) into rows before every product, `nn.MultiheadAttention`
turns it to (tokens, batch, features), and both turn it back later. Once layers stand on the tensor
as it was, these views meet each other and cancel, and attention sees the layers it is fed by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from aerogel.runtime import graph, ops
from aerogel.runtime.movement import element_numbers, is_move, origin

aten = torch.ops.aten


def layers_before_movement(gm: fx.GraphModule) -> fx.GraphModule:
    """Let linear layers, layer norms and activations read what stands before a move of rows.

    Their results are moved instead. A move of rows keeps every token's features together, with
    tokens in the order they had or with the first two axes exchanged.
    """
    gm = graph.clone(gm)
    for node in graph.calls(gm, ops.linear, ops.activation, aten.layer_norm.default):
        moved: Any = node.args[0]
        if not is_move(moved) or not _is_plain(node):
            continue
        source = origin(moved)
        exchanged = _exchanges_axes(moved, source)
        if exchanged is not None:
            _put_before(node, source, exchanged)
    return graph.tidy(gm)


def _is_plain(node: fx.Node) -> bool:
    """No residual, which would have to move back, and a norm over the features alone."""
    if node.target is aten.layer_norm.default:
        return list(graph.arguments(node)["normalized_shape"]) == [graph.shape(node)[-1]]
    return node.target is ops.activation or len(node.args) == 3


def _exchanges_axes(moved: fx.Node, source: fx.Node) -> bool | None:
    """Whether rows come with the first two axes exchanged; None if they come in any other order."""
    if not all(isinstance(graph.value(each), Tensor) for each in (moved, source)):
        return None
    before, after = graph.shape(source), graph.shape(moved)
    if source.op == "get_attr" or min(len(before), len(after)) < 2 or before[-1] != after[-1]:
        return None
    numbers = element_numbers(moved, source)
    size = int(torch.Size(before).numel())
    if numbers is None or numbers.numel() != size or size == 0:
        return None
    in_order = torch.arange(size, dtype=torch.int32).view(before)
    if torch.equal(numbers.reshape(before), in_order):
        return False
    turned = in_order.transpose(0, 1) if len(before) == 3 else None
    if turned is not None and torch.equal(numbers.reshape(turned.shape), turned):
        return True
    return None


def _put_before(node: fx.Node, source: fx.Node, exchanged: bool) -> None:
    shape, features = list(graph.shape(node)), graph.shape(node)[-1]
    value = graph.value(source).new_empty((*graph.shape(source)[:-1], features))
    with node.graph.inserting_before(node):
        made = node.graph.call_function(node.target, (source, *node.args[1:]), node.kwargs)  # type: ignore[arg-type]
        made.meta = {**node.meta, "val": value}
        back = made
        if exchanged:
            back = node.graph.call_function(aten.transpose.int, (made, 0, 1))
            back.meta["val"] = value.transpose(0, 1)
        if list(back.meta["val"].shape) != shape:
            back = node.graph.call_function(aten.reshape.default, (back, shape))
            back.meta["val"] = graph.value(node)
    node.replace_all_uses_with(back)
    node.graph.erase_node(node)
