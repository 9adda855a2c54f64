"""An activation right behind a layer becomes the layer's epilogue."""

from __future__ import annotations

from torch import fx

from aerogel.runtime import graph, ops
from aerogel.runtime.layer import epilogue, is_layer, plain_arguments


def fuse_activation(gm: fx.GraphModule) -> fx.GraphModule:
    """Let each conv2d or linear apply the activation that alone reads its result."""
    gm = graph.clone(gm)
    for node in list(graph.calls(gm, ops.activation)):
        layer, kind = node.args
        if not isinstance(layer, fx.Node) or not is_layer(layer):
            continue
        present, residual = epilogue(layer)
        if present != "none" or graph.only_user(layer) is not node:
            continue
        layer.args = (*plain_arguments(layer), kind, residual)
        node.replace_all_uses_with(layer)
        gm.graph.erase_node(node)
    return graph.tidy(gm)
