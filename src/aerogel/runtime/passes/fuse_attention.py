"""Softmax attention, however it is spelled, becomes one operator on token-major tensors.

Known are `scaled_dot_product_attention` and products around a softmax, with queries, keys and
values made from (batch, tokens, features) by any views: three projections, or parts of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aerogel.runtime import graph, ops
from aerogel.runtime.movement import element_numbers, origin
from aerogel.runtime.passes.attention_masks import MaskError, Masks

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PRODUCT = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class Found:
    """An attention in the graph.

    Attributes:
        result: The node to replace, (batch, heads, queries, size).
        q: Its query, (batch, heads, queries, size).
        k: Its key, likewise, or transposed as the second operand of a product.
        v: Its value.
        mask: What is added, or a mask of booleans; None without.
        causal: Whether keys after the query are hidden, too.
        scale: Of the scores.
        transposed: Whether k is (batch, heads, size, keys).
        empty_is_zero: See `ops.attention`.
    """

    result: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float
    transposed: bool
    empty_is_zero: bool


def fuse_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace attentions by `ops.attention` and the views that its callers expect."""
    gm = graph.clone(gm)
    masks = Masks(gm)
    for found in _find(gm):
        _fuse(found, masks)
    return graph.tidy(gm)


def _find(gm: fx.GraphModule) -> Iterator[Found]:
    for node in graph.calls(gm, aten.scaled_dot_product_attention.default):
        yield from _read_call(node)
    for node in graph.calls(gm, *_SOFTMAX):
        yield from _read_products(gm, node)


def _read_call(node: fx.Node) -> Iterator[Found]:
    args = graph.arguments(node)
    q, k, v = args["query"], args["key"], args["value"]
    if args["dropout_p"] or not all(len(graph.shape(each)) == 4 for each in (q, k, v)):
        return
    scale = args.get("scale")
    scale = graph.shape(q)[-1] ** -0.5 if scale is None else float(scale)
    causal = bool(args["is_causal"])
    yield Found(node, q, k, v, args["attn_mask"], causal, scale, False, empty_is_zero=True)


def _read_products(gm: fx.GraphModule, softmax: fx.Node) -> Iterator[Found]:
    """softmax(q @ k * scale + mask) @ v, with the scale before or after the product."""
    args, product = graph.arguments(softmax), graph.only_user(softmax)
    scores, axis = args["self"], args["dim"] % len(graph.shape(softmax))
    if product is None or product.target not in _PRODUCT or product.args[0] is not softmax:
        return
    if args.get("dtype") not in (None, torch.float32) or not graph.is_float32(softmax):
        return
    if axis != 3 or len(graph.shape(softmax)) != 4 or graph.only_user(scores) is not softmax:
        return
    mask = None
    if scores.target is aten.add.Tensor:
        scores, mask = _split_sum(scores)
    scores, scale = _split_scale(gm, scores)
    if scores is None or scores.target not in _PRODUCT or graph.only_user(scores) is None:
        return
    q, k = scores.args
    value: Any = product.args[1]
    q, before = _split_scale(gm, q)
    k, before_too = _split_scale(gm, k)
    if not all(isinstance(each, fx.Node) for each in (q, k, value)):
        return
    factor = scale * before * before_too
    yield Found(product, q, k, value, mask, False, factor, True, empty_is_zero=False)


def _split_sum(node: fx.Node) -> tuple[Any, Any]:
    """(scores, mask) of an addition; the scores are what has the result's full shape."""
    left, right = node.args[:2]
    if graph.arguments(node)["alpha"] != 1 or not isinstance(right, fx.Node):
        return node, None
    is_scores = _comes_from_product(left)
    return (left, right) if is_scores else (right, left)


def _comes_from_product(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.target in (aten.mul.Tensor, aten.div.Tensor):
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target in _PRODUCT


def _split_scale(gm: fx.GraphModule, node: Any) -> tuple[Any, float]:
    """(x, s) for x * s or x / s with a number s that only one reader sees; else (node, 1)."""
    if not isinstance(node, fx.Node) or node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return node, 1.0
    args: Any = node.args
    x, by = args[:2]
    constant = graph.constant(gm, by)
    if constant is not None and constant.numel() == 1:
        by = float(constant)
    if isinstance(by, fx.Node) or not isinstance(x, fx.Node) or by == 0:
        return node, 1.0
    return x, float(by) if node.target is aten.mul.Tensor else 1.0 / float(by)


def _fuse(found: Found, masks: Masks) -> None:
    operands = (found.q, found.k, found.v)
    if not all(graph.is_float32(each) for each in (*operands, found.result)):
        return
    k_axes = (0, 1, 3, 2) if found.transposed else (0, 1, 2, 3)
    places = [_locate(found.q), _locate(found.k, k_axes), _locate(found.v)]
    if any(place is None for place in places):
        return
    sources, heads = zip(*(place for place in places if place), strict=True)
    if not _fit(sources, heads):
        return
    try:
        mask = masks.additive(found.mask, found.causal, sources[0], sources[1], found.result)
    except MaskError:
        return
    args = (*sources, mask, heads, found.scale, found.empty_is_zero)
    _put_in_place(found.result, args)


def _put_in_place(result: fx.Node, args: tuple[Any, ...]) -> None:
    seen = graph.value(result).transpose(1, 2)
    sizes = list(graph.shape(result))
    with result.graph.inserting_before(result):
        fused = result.graph.call_function(ops.attention, args)
        fused.meta["val"] = seen.flatten(2)
        split = [sizes[0], sizes[2], sizes[1], sizes[3]]
        view = result.graph.call_function(aten.view.default, (fused, split))
        view.meta["val"] = seen
        back = result.graph.call_function(aten.transpose.int, (view, 1, 2))
        back.meta["val"] = graph.value(result)
    result.replace_all_uses_with(back)
    result.graph.erase_node(result)


def _fit(sources: tuple[fx.Node, ...], heads: tuple[ops.Heads, ...]) -> bool:
    """Whether batch, tokens and heads agree; broadcasting attentions stay in torch."""
    (of_q, of_k, of_v), shapes = heads, [graph.shape(each) for each in sources]
    same_tokens = shapes[1][:2] == shapes[2][:2] and shapes[0][0] == shapes[1][0]
    same_heads = of_k[0] == of_v[0] and of_q[1] == of_k[1]
    return same_tokens and same_heads and of_q[0] % of_k[0] == 0


def _locate(
    node: fx.Node, axes: tuple[int, ...] = (0, 1, 2, 3)
) -> tuple[fx.Node, ops.Heads] | None:
    """The (batch, tokens, features) tensor that a node's heads are part of, and where they lie.

    Args:
        node: (batch, heads, tokens, size) once its axes are permuted.
        axes: The permutation.
    """
    source = origin(node)
    if not isinstance(graph.value(source), Tensor) or len(graph.shape(source)) != 3:
        return None
    if source.op == "get_attr" or not graph.is_float32(source) or len(graph.shape(node)) != 4:
        return None
    numbers = element_numbers(node, source)
    if numbers is None or numbers.numel() == 0:
        return None
    numbers = numbers.permute(axes)
    batch, count, tokens, size = numbers.shape
    shape = graph.shape(source)
    first = int(numbers[0, 0, 0, 0])
    if shape[:2] != (batch, tokens) or first + count * size > shape[2]:
        return None
    whole = torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
    expected = whole[..., first : first + count * size].unflatten(-1, (count, size))
    if not torch.equal(expected.transpose(1, 2), numbers):
        return None
    return source, (count, size, first)
