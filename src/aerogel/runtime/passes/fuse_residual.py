"""The addition of a residual branch happens while the layer's output is still in registers."""

from __future__ import annotations

import torch
from torch import fx

from aerogel.runtime import graph
from aerogel.runtime.layer import epilogue, is_layer, plain_arguments

aten = torch.ops.aten


def fuse_residual(gm: fx.GraphModule) -> fx.GraphModule:
    """Give layer + tensor of the same shape to the layer as its residual.

    Only where the addition is the layer's single reader and no activation stands between. Of
    two layers that are added, the later one takes the other in.
    """
    gm = graph.clone(gm)
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    for add in list(graph.calls(gm, aten.add.Tensor)):
        if graph.arguments(add)["alpha"] != 1:
            continue
        operands = [arg for arg in add.args if isinstance(arg, fx.Node)]
        if len(operands) != 2 or operands[0] is operands[1]:
            continue
        for layer in sorted(operands, key=lambda node: order.get(node, -1), reverse=True):
            residual = operands[1] if layer is operands[0] else operands[0]
            if _is_fusable(layer, residual, add):
                _fuse(layer, residual, add)
                break
    return graph.tidy(gm)


def _is_fusable(layer: fx.Node, residual: fx.Node, add: fx.Node) -> bool:
    if not is_layer(layer) or graph.only_user(layer) is not add:
        return False
    if epilogue(layer) != ("none", None) or residual.op == "get_attr":
        return False
    same_type = graph.value(layer).dtype == graph.value(residual).dtype
    return same_type and graph.shape(layer) == graph.shape(residual) == graph.shape(add)


def _fuse(layer: fx.Node, residual: fx.Node, add: fx.Node) -> None:
    # Stands where the addition stood, so that the residual is computed by then.
    fused = graph.replace(add, layer.target, (*plain_arguments(layer), "none", residual))
    fused.meta["layer"] = layer.meta.get("layer", layer.name)
    layer.graph.erase_node(layer)
