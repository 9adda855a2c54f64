"""What is added to attention scores, in its smallest form and made once for all layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from aerogel.runtime import graph, ops

aten = torch.ops.aten

_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)


class MaskError(ValueError):
    """A mask that `ops.attention` cannot take."""


class Masks:
    """The additive masks of a graph; layers with the same mask share one.

    Args:
        gm: The graph, to which nodes are added.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._made: dict[Any, fx.Node] = {}

    def additive(
        self, mask: fx.Node | None, causal: bool, query: fx.Node, key: fx.Node, before: fx.Node
    ) -> fx.Node | None:
        """The mask as `ops.attention` takes it, None if nothing is hidden.

        Args:
            mask: Of booleans (what may be seen) or floats (what is added), or None.
            causal: Hide keys after the query; then `mask` must be None.
            query: (batch, queries, features).
            key: (batch, keys, features).
            before: Where the mask must be known.

        Raises:
            MaskError: Another dtype or shape, or both kinds at once.
        """
        batch, queries, _ = graph.shape(query)
        keys = graph.shape(key)[1]
        if causal:
            if mask is not None:
                raise MaskError("a causal mask besides another one")
            return self._causal(queries, keys, before)
        if mask is None:
            return None
        kind, fill = graph.value(mask).dtype, -math.inf
        if kind not in (torch.bool, torch.float32):
            raise MaskError(f"a mask of {kind}")
        narrow, fill = self._narrow(mask, fill)
        if narrow is None:
            return None
        shape = graph.shape(narrow)
        if len(shape) > 4 or shape[-1:] != (keys,):
            raise MaskError(f"a mask of shape {shape} for {keys} keys")
        return self._make(narrow, fill, batch)

    def _causal(self, queries: int, keys: int, before: fx.Node) -> fx.Node:
        made = self._made.get((queries, keys))
        if made is None:
            hidden = (
                torch.full((queries, keys), -math.inf, dtype=torch.float32)
                .triu(1)
                .view(1, 1, queries, keys)
            )
            made = graph.add_constant(self._gm, "causal_mask", hidden, before)
            self._made[queries, keys] = made
        return made

    def _make(self, mask: fx.Node, fill: float, batch: int) -> fx.Node:
        """A node right behind the mask, which every layer is behind of."""
        known = graph.constant(self._gm, mask)
        key = (mask, fill, batch)
        if key in self._made:
            return self._made[key]
        with mask.graph.inserting_after(mask):
            made = mask.graph.call_function(ops.additive_mask, (mask, fill, batch))
        made.meta["val"] = _example(mask, batch)
        if known is not None:
            value = ops.additive_mask(known, fill, known.shape[0] if known.dim() == 4 else 1)
            if bool((value == value[:1]).all()):  # the same for all calls and images
                made = graph.add_constant(self._gm, "mask", value[:1].clone(), made)
        self._made[key] = made
        return made

    def _narrow(self, mask: fx.Node, fill: float) -> tuple[fx.Node | None, float]:
        """Strip what only makes a mask larger; None for one that hides nothing."""
        while True:
            known = graph.constant(self._gm, mask)
            if known is not None:
                hides = not bool(known.all()) if known.dtype == torch.bool else bool(known.any())
                return (mask if hides else None), fill
            if mask.target is aten.expand.default and _same_rank(mask):
                mask = _first(mask)
            elif mask.target in _AND:
                left, right = (each for each in mask.args[:2] if isinstance(each, fx.Node))
                if self._shows_all(left):
                    mask = right
                elif self._shows_all(right):
                    mask = left
                else:
                    return mask, fill
            elif mask.target is aten.where.ScalarOther and self._is_zero(mask.args[1]):
                mask, fill = _first(mask), float(mask.args[2])  # type: ignore[arg-type]
            else:
                return mask, fill

    def _shows_all(self, mask: fx.Node) -> bool:
        known = graph.constant(self._gm, mask)
        if known is None and mask.target is aten.expand.default:
            known = graph.constant(self._gm, mask.args[0])
        return known is not None and known.dtype == torch.bool and bool(known.all())

    def _is_zero(self, value: Any) -> bool:
        known = graph.constant(self._gm, value)
        return known is not None and known.numel() == 1 and float(known) == 0.0


def _first(node: fx.Node) -> fx.Node:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _same_rank(node: fx.Node) -> bool:
    return len(graph.shape(_first(node))) == len(graph.shape(node))


def _example(mask: fx.Node, batch: int) -> Tensor:
    shape = (1,) * (4 - len(graph.shape(mask))) + graph.shape(mask)
    return torch.empty((batch, *shape[1:]), dtype=torch.float32, device="meta")
