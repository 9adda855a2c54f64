"""Reading and editing the captured graph: the few verbs that all passes share.

The graph is flat and functional: placeholders are the leaves of the call, weights are
`get_attr` nodes onto buffers, `meta["val"]` holds each value's shape and dtype.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be edited; the tensors are shared."""
    return fx.GraphModule(gm, copy.deepcopy(gm.graph))


def tidy(gm: fx.GraphModule) -> fx.GraphModule:
    """Drop what nobody uses any more and compile the graph."""
    gm.graph.eliminate_dead_code()
    used = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in gm.named_buffers() if name not in used]:
        delattr(gm, name)
    gm.graph.lint()
    gm.recompile()
    return gm


def calls(gm: fx.GraphModule, *targets: Any) -> Iterator[fx.Node]:
    """The call_function nodes with one of these targets, in order; safe to edit meanwhile."""
    wanted = set(targets)
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in wanted:
            yield node


def constant(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor behind a `get_attr` node, or None if the argument is anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = getattr(gm, str(node.target), None)
    return value if isinstance(value, Tensor) else None


def add_constant(gm: fx.GraphModule, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    """Store a tensor under a free name and return its `get_attr` node."""
    free = base = re.sub(r"\W", "_", name)
    count = 0
    while hasattr(gm, free):
        count += 1
        free = f"{base}_{count}"
    gm.register_buffer(free, value)
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(free)
    node.meta["val"] = value
    return node


def value(node: fx.Node) -> Any:
    """What the node yields: a (fake) tensor with the right shape and dtype, or a plain value."""
    return node.meta.get("val")


def shape(node: fx.Node) -> tuple[int, ...]:
    """Static shape of a tensor-valued node."""
    return tuple(int(size) for size in value(node).shape)


def is_float32(node: fx.Node) -> bool:
    """Whether the node yields one float32 tensor."""
    seen = value(node)
    return isinstance(seen, Tensor) and seen.dtype == torch.float32


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    found = {arg.name: arg.default_value for arg in schema.arguments if arg.has_default_value()}
    found.update(zip((arg.name for arg in schema.arguments), node.args, strict=False))
    found.update(node.kwargs)
    return found


def replace(old: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Put a call in the place of a node; it takes over the users and what is known about it."""
    with old.graph.inserting_before(old):
        new = old.graph.call_function(target, args)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    return new


def only_user(node: fx.Node) -> fx.Node | None:
    """The single node that reads this one, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None
