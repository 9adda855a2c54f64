"""What functions do to channels: those that move axes, merge them or let tensors meet."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, fx

from aerogel.sparsity.channels.graph import Channels, Op, Value


def same(op: Op) -> Value:
    return dict(op.x.meta["channels"])


def pool(op: Op) -> Any:
    if not isinstance(op.result, Tensor):
        return op.pinned()  # with indices
    name = type(op.module).__name__ if op.module else str(op.node.target)
    if op.module is None and not isinstance(op.node.target, str):
        name = op.node.target.__name__
    spatial = int(re.findall(r"([123])d", name)[-1])
    return op.keep(op.x.meta["channels"], range(len(op.shape) - spatial))


def spatial(op: Op) -> Value:
    return op.keep(op.x.meta["channels"], (0, 1))


def pad(op: Op) -> Value:
    padding = op.module.padding if op.module is not None else op.argument(1, "pad")
    return op.keep(op.x.meta["channels"], range(len(op.shape) - len(padding) // 2))


def functional_linear(op: Op) -> Any:
    weight, bias = op.argument(1, "weight"), op.argument(2, "bias")
    matrix: Value = weight.meta["channels"]
    value, last = op.x.meta["channels"], len(op.shape) - 1
    op.graph.tie(value.get(last), matrix.get(1))
    if bias is not None:
        op.graph.tie(bias.meta["channels"].get(0), matrix.get(0))
    out = {last: matrix[0]} if 0 in matrix else {}
    return {**{d: c for d, c in value.items() if d != last}, **out}


def join(op: Op) -> Value:
    """Elementwise with broadcasting: axes that meet carry the same channels."""
    nodes = [n for n in op.node.all_input_nodes if isinstance(n.meta["shapes"], tuple)]
    shape, result = op.shape, {}
    for dim, size in enumerate(shape):
        met: list[Channels | None] = []
        for node in nodes:
            own = dim - (len(shape) - len(node.meta["shapes"]))
            if own < 0:
                continue
            channels = node.meta["channels"].get(own)
            if node.meta["shapes"][own] == size:
                met.append(channels)
            else:
                op.graph.pin(channels)  # one entry spread over the axis
        tracked = [channels for channels in met if channels is not None]
        for channels in met if tracked else ():
            op.graph.tie(tracked[0], channels)
        if tracked and len(tracked) == len(met):
            result[dim] = tracked[0]
    return result


def reduce(op: Op) -> Any:
    value, before = op.x.meta["channels"], len(op.x.meta["shapes"])
    dims = op.argument(1, "dim")
    if not isinstance(op.result, Tensor) or isinstance(dims, bool):
        return op.pinned()
    if not isinstance(dims, (int, tuple, list)):
        return {}  # over everything: symmetric in all axes
    gone = {d % before for d in ([dims] if isinstance(dims, int) else dims)}
    if len(op.shape) == before:  # keepdim
        return {d: c for d, c in value.items() if d not in gone}
    kept = [d for d in range(before) if d not in gone]
    return {kept.index(d): c for d, c in value.items() if d in kept}


def reorder(op: Op) -> Value:
    """Permutations of axes: the operation itself, run on a tensor with distinct sizes, tells."""
    before = len(op.x.meta["shapes"])
    probe = torch.empty(tuple(range(2, 2 + before)), device="meta")
    target, rest = op.node.target, op.args[1:]
    if isinstance(target, str):
        moved = getattr(probe, target)(*rest, **op.node.kwargs)
    else:
        moved = target(probe, *rest, **op.node.kwargs)
    sources = [size - 2 for size in moved.shape]
    value = op.x.meta["channels"]
    return {new: value[old] for new, old in enumerate(sources) if old in value}


def attribute(op: Op) -> Any:
    name = op.args[1]
    if name == "data":
        return same(op)
    if name in ("T", "mT") and len(op.shape) >= 2:
        last, before = len(op.shape) - 1, len(op.x.meta["shapes"])
        order = list(range(before))
        if name == "T":
            order.reverse()
        else:
            order[last - 1 :] = [last, last - 1]
        value = op.x.meta["channels"]
        return {new: value[old] for new, old in enumerate(order) if old in value}
    return op.pinned()


def reshape(op: Op) -> Value:
    """Merging axes repeats channels; splitting an axis pins it."""
    value: Value = dict(op.x.meta["channels"])
    before, after = op.x.meta["shapes"], op.shape
    result: Value = {}
    for ins, outs in _matching_blocks(before, after):
        tracked = [d for d in ins if d in value]
        if len(ins) == len(outs) == 1 and tracked:
            result[outs[0]] = value.pop(ins[0])
        elif len(outs) == 1 and len(tracked) == 1:
            result[outs[0]] = _merged(value.pop(tracked[0]), tracked[0], ins, before)
    for channels in value.values():
        op.graph.pin(channels)
    return result


def _matching_blocks(
    before: tuple[int, ...], after: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
    """Smallest groups of axes with equal products, in order; axes of size 1 carry nothing."""
    ins = [d for d, size in enumerate(before) if size != 1]
    outs = [d for d, size in enumerate(after) if size != 1]
    blocks = []
    while ins and outs:
        left, right = [ins.pop(0)], [outs.pop(0)]
        while (a := _product(before, left)) != (b := _product(after, right)):
            if a < b:
                left.append(ins.pop(0))
            else:
                right.append(outs.pop(0))
        blocks.append((left, right))
    return blocks


def _product(shape: tuple[int, ...], dims: list[int]) -> int:
    return math.prod(shape[d] for d in dims)


def _merged(channels: Channels, dim: int, dims: list[int], shape: tuple[int, ...]) -> Channels:
    sizes = [shape[d] for d in dims]
    view = [1] * len(dims)
    view[dims.index(dim)] = shape[dim]
    spread = torch.tensor(channels).view(view).expand(sizes).flatten()
    return [int(c) for c in spread.tolist()]


def cat(op: Op) -> Any:
    nodes = op.argument(0, "tensors")
    if not isinstance(nodes, (tuple, list)):
        return op.pinned()
    dim = op.argument(1, "dim", 0) % len(op.shape)
    values: list[Value] = [node.meta["channels"] for node in nodes]
    result: Value = {}
    for axis in range(len(op.shape)):
        parts = [value.get(axis) for value in values]
        known = [part for part in parts if part is not None]
        if not known:
            continue
        if axis != dim:
            for part in parts:
                op.graph.tie(known[0], part)
            result[axis] = known[0]
        else:
            sizes = [node.meta["shapes"][axis] for node in nodes]
            # 0 is the fixed channel: those pieces keep their places in the whole.
            joined = [p if p is not None else [0] * s for p, s in zip(parts, sizes, strict=True)]
            result[axis] = [channel for part in joined for channel in part]
    return result


def split(op: Op) -> list[Value]:
    dim = op.argument(2, "dim", 0) % len(op.x.meta["shapes"])
    value, start, parts = op.x.meta["channels"], 0, []
    for piece in op.result:
        stop = start + piece.shape[dim]
        parts.append({d: c[start:stop] if d == dim else c for d, c in value.items()})
        start = stop
    return parts


def getitem(op: Op) -> Any:
    index: Any = op.args[1]
    value = op.x.meta["channels"]
    if isinstance(value, list):
        return value[index] if isinstance(index, int) else op.pinned()
    entries = list(index) if isinstance(index, tuple) else [index]
    ndim = len(op.x.meta["shapes"])
    if any(not isinstance(e, (int, slice, type(None), type(...))) for e in entries):
        return op.pinned()
    if ... in entries:
        at = entries.index(...)
        named = sum(e is not None for e in entries) - 1
        entries[at : at + 1] = [slice(None)] * (ndim - named)
    entries += [slice(None)] * (ndim - sum(e is not None for e in entries))
    result: Value = {}
    old = new = 0
    for entry in entries:
        if entry is None:
            new += 1
        elif isinstance(entry, int):
            op.graph.pin(value.get(old))  # one particular channel is picked
            old += 1
        else:
            if any(isinstance(part, fx.Node) for part in (entry.start, entry.stop, entry.step)):
                return op.pinned()
            if old in value:
                result[new] = value[old][entry]
            old, new = old + 1, new + 1
    return result


def squeeze(op: Op) -> Value:
    before, dims = op.x.meta["shapes"], op.argument(1, "dim")
    listed = range(len(before)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(before) for d in listed if before[d] == 1}
    kept = [d for d in range(len(before)) if d not in gone]
    value = op.keep(op.x.meta["channels"], kept)
    return {kept.index(d): c for d, c in value.items()}


def unsqueeze(op: Op) -> Value:
    dim = op.argument(1, "dim") % len(op.shape)
    return {d + (d >= dim): c for d, c in op.x.meta["channels"].items()}


def expand(op: Op) -> Value:
    lead = len(op.shape) - len(op.x.meta["shapes"])
    before = op.x.meta["shapes"]
    value = op.keep(
        op.x.meta["channels"], [d for d, size in enumerate(before) if op.shape[d + lead] == size]
    )
    return {d + lead: c for d, c in value.items()}


def glu(op: Op) -> Value:
    dim = op.module.dim if op.module is not None else op.argument(1, "dim", -1)
    dim %= len(op.shape)
    value = dict(op.x.meta["channels"])
    if dim in value:
        half = len(value[dim]) // 2
        op.graph.tie(value[dim][:half], value[dim][half:])
        value[dim] = value[dim][:half]
    return value
