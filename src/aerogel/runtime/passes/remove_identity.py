"""Remove what does nothing at inference: dropout, identities, casts to the same type, asserts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from aerogel.runtime import graph

aten = torch.ops.aten

_DROPOUT = {aten.dropout.default, aten.alpha_dropout.default, aten.feature_dropout.default}
_ALWAYS = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
# Shapes and types were fixed by the example and every call is checked against them.
_ASSERTS = {aten._assert_tensor_metadata.default}
_SAME_TYPE = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default}
_SAME_SHAPE = {aten.view.default, aten.reshape.default, aten.expand.default}


def remove_identity(gm: fx.GraphModule) -> fx.GraphModule:
    """Let every user of an operator without effect read that operator's input instead.

    An input or a weight is never returned in place of a copy of it: a caller may write to
    what it gets.
    """
    gm = graph.clone(gm)
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTS:
            gm.graph.erase_node(node)
        elif _does_nothing(node) and not _would_leak(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    return graph.tidy(gm)


def _does_nothing(node: fx.Node) -> bool:
    target: Any = node.target
    if target in _ALWAYS:
        return True
    if target in _DROPOUT:
        return graph.arguments(node)["train"] is False
    if target is aten.clone.default:
        return graph.arguments(node)["memory_format"] in (None, torch.preserve_format)
    if target in _SAME_TYPE:
        return _same(node, "dtype", "device", "layout") and not _changes_strides(node)
    return target in _SAME_SHAPE and _same(node, "shape")


def _same(node: fx.Node, *properties: str) -> bool:
    before, after = graph.value(node.args[0]), graph.value(node)  # type: ignore[arg-type]
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and all(getattr(before, name) == getattr(after, name) for name in properties)
    )


def _changes_strides(node: fx.Node) -> bool:
    return graph.arguments(node).get("memory_format") not in (None, torch.preserve_format)


def _would_leak(node: fx.Node) -> bool:
    source = node.args[0]
    is_result = any(user.op == "output" for user in node.users)
    return is_result and isinstance(source, fx.Node) and source.op in ("placeholder", "get_attr")
