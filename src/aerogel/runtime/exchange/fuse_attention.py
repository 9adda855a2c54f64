"""Attention that a file spells out, as the one operator that it is."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from aerogel.runtime.exchange.elementwise import add, div, mul, where
from aerogel.runtime.exchange.fusions import calls, is_call, replace, with_number
from aerogel.runtime.exchange.reductions import softmax
from aerogel.runtime.exchange.shapes import transpose


def fuse_attention(gm: fx.GraphModule) -> None:
    """softmax(q @ k.T * scale + mask) @ v becomes `F.scaled_dot_product_attention`.

    Where a mask hides everything from a query, the result is 0, as PyTorch has it, also for files
    that would give NaN.
    """
    for node in calls(gm, torch.matmul):
        weights, values = node.args
        scores = _scores(weights)
        if scores is None:
            continue
        scores, mask = _without_mask(scores)
        scores, scale = _without_scale(scores)
        if not _is_private(scores) or not is_call(scores, torch.matmul):
            continue
        queries, query_scale = _without_scale(scores.args[0])
        keys, key_scale = _without_scale(scores.args[1])
        with gm.graph.inserting_before(node):
            keys = _turned(gm.graph, keys)
        replace(
            node,
            F.scaled_dot_product_attention,
            queries,
            keys,
            values,
            attn_mask=mask,
            scale=scale * query_scale * key_scale,
        )


def _is_private(value: Any) -> bool:
    return isinstance(value, fx.Node) and len(value.users) == 1


def _scores(weights: Any) -> Any:
    """What the attention weights are the softmax of, over the last axis."""
    if is_call(weights, where):  # PyTorch's exporter turns NaN into 0
        condition, zero, inner = weights.args
        guarded = is_call(condition, torch.isnan) and condition.args[0] is inner
        if not (guarded and zero == 0 and set(inner.users) == {condition, weights}):
            return None
        weights_alone, weights = _is_private(weights), inner
    else:
        weights_alone = _is_private(weights)
    if not weights_alone or not is_call(weights, softmax):
        return None
    scores, axis, log, flat = (*weights.args, False, False)[:4]
    rank_is_known = axis == -1 or (axis == 3 and flat)
    return scores if rank_is_known and not log and _is_private(scores) else None


def _without_mask(scores: Any) -> tuple[Any, Any]:
    """(scores, mask): of a sum, the term that is a product of matrices is the scores."""
    if not is_call(scores, add):
        return scores, None
    for inner, mask in (scores.args, scores.args[::-1]):
        if is_call(_without_scale(inner)[0], torch.matmul) and isinstance(mask, fx.Node):
            return (inner, mask) if _is_private(inner) else (scores, None)
    return scores, None


def _without_scale(value: Any) -> tuple[Any, float]:
    """(value, factor): a number that a value is multiplied with or divided by."""
    found = with_number(value, mul)
    if found is not None and math.isfinite(found[1]):
        return found
    if is_call(value, div) and isinstance(value.args[1], int | float) and value.args[1] != 0:
        return value.args[0], 1.0 / float(value.args[1])
    return value, 1.0


def _turned(graph: fx.Graph, keys: Any) -> Any:
    """The keys as rows; the file has them as columns."""
    if is_call(keys, transpose):
        source, order = keys.args
        rank = len(order or ())
        if rank > 1 and list(order) == [*range(rank - 2), rank - 1, rank - 2]:
            return source
    return graph.call_function(torch.transpose, (keys, -2, -1))
