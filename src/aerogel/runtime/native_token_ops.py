"""Operators over tokens that a native plan knows: what stands between a transformer's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from aerogel import kernels
from aerogel.runtime import graph, ops
from aerogel.runtime.emission import Emission, NativeOp
from aerogel.runtime.native_ops import emit_pair, pair_family
from aerogel.runtime.segments import EITHER, SEQUENCES, SPATIAL, TOKENS

aten = torch.ops.aten


def is_mask(node: fx.Node) -> bool:
    """Whether a node is what an attention adds to its scores."""
    return any(user.target is ops.attention and user.args[3] is node for user in node.users)


def _weight(node: Any) -> Tensor | None:
    """The tensor behind a weight of the graph, in float32."""
    if not isinstance(node, fx.Node) or node.graph.owning_module is None:
        return None
    value = graph.constant(node.graph.owning_module, node)
    return value.detach() if value is not None and value.dtype == torch.float32 else None


def _per_row_family(node: fx.Node) -> str:
    return EITHER if len(graph.shape(node)) == 2 else TOKENS


# normalisation


def _norm_family(node: fx.Node) -> str | None:
    args = graph.arguments(node)
    shape = graph.shape(node)
    if len(shape) < 2 or tuple(args["normalized_shape"]) != shape[-1:]:
        return None
    weights = (args["weight"], args["bias"])
    known = all(each is None or _weight(each) is not None for each in weights)
    return _per_row_family(node) if known and graph.is_float32(args["input"]) else None


def _emit_norm(emission: Emission, node: fx.Node) -> Any:
    args = graph.arguments(node)
    return emission.builder.layer_norm(
        emission.values[args["input"]], _weight(args["weight"]), _weight(args["bias"]), args["eps"]
    )


# attention


def _attention_family(node: fx.Node) -> str | None:
    mask = node.args[3]
    if isinstance(mask, fx.Node) and mask.op == "get_attr" and _weight(mask) is None:
        return None
    return SEQUENCES


def _emit_attention(emission: Emission, node: fx.Node) -> Any:
    args: Any = node.args
    q, k, v, mask, heads, scale, empty_is_zero = args
    of_q, of_k, of_v = (kernels.HeadRows(*each) for each in heads)
    value, columns = _mask(emission, mask)
    return emission.builder.attention(
        emission.values[q],
        emission.values[k],
        emission.values[v],
        of_q,
        mask=value,
        mask_columns=columns,
        scale=scale,
        sequences=emission.sequences,
        empty_is_zero=empty_is_zero,
        k_heads=of_k,
        v_heads=of_v,
    )


def _mask(emission: Emission, mask: Any) -> tuple[Any, tuple[int, int, int]]:
    """The mask's value and what its columns are: (sequences, heads, queries)."""
    if mask is None:
        return None, (1, 1, 1)
    _, heads, queries, keys = graph.shape(mask)
    known = _weight(mask)
    if known is None:
        return emission.values[mask], (emission.sequences, heads, queries)
    if mask not in emission.values:
        by_key = known[0].reshape(heads * queries, keys).t().contiguous()
        emission.values[mask] = emission.builder.constant(by_key)
    return emission.values[mask], (1, heads, queries)


# sums and products with a constant


def _operand(node: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """(x, c) of x + c or x * c with a constant c of at most x's shape, equal for every image."""
    shape = graph.shape(node)
    if len(shape) not in (2, 3) or graph.arguments(node).get("alpha", 1) != 1:
        return None
    for x, other in (node.args[:2], node.args[1::-1]):
        if isinstance(other, int | float):
            constant: Tensor | None = torch.tensor(float(other), dtype=torch.float32)
        else:
            constant = _weight(other)
        if not isinstance(x, fx.Node) or constant is None or x.op == "get_attr":
            continue
        if not graph.is_float32(x) or graph.shape(x) != shape or constant.dim() > len(shape):
            continue
        return x, constant
    return None


def _per_feature(constant: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """(features,) if the constant is the same for every token."""
    if constant.numel() > 1 and constant.shape[-1] != constant.numel():
        return None
    return constant.reshape(-1).expand(shape[-1]).contiguous()


def _per_token(constant: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """(tokens, features) if the constant is the same for every sequence."""
    whole = constant.expand(shape)
    same = len(shape) == 3 and bool((whole == whole[:1]).all())
    return whole[0].contiguous() if same else None


def _sum_family(node: fx.Node) -> str | None:
    found = _operand(node)
    if found is None:
        return pair_family(node)
    _, constant = found
    if _per_feature(constant, graph.shape(node)) is not None:
        return _per_row_family(node)
    return SEQUENCES if _per_token(constant, graph.shape(node)) is not None else None


def _emit_sum(method: str) -> Callable[[Emission, fx.Node], Any]:
    emit_values = emit_pair(method)

    def emit(emission: Emission, node: fx.Node) -> Any:
        found = _operand(node)
        if found is None:
            return emit_values(emission, node)
        x, constant = emission.values[found[0]], _per_feature(found[1], graph.shape(node))
        if constant is None:
            tokens = _per_token(found[1], graph.shape(node))
            assert tokens is not None
            constant = tokens.t().repeat(1, emission.sequences)
        return getattr(emission.builder, method)(x, emission.builder.constant(constant))

    return emit


# tokens of images, and some of them


def _to_tokens_family(node: fx.Node) -> str:
    return SPATIAL


def _emit_to_tokens(emission: Emission, node: fx.Node) -> Any:
    _, tokens, channels = graph.shape(node)
    return emission.builder.reshape(emission.values[node.args[0]], (channels, tokens))


def _select_family(node: fx.Node) -> str | None:
    args = graph.arguments(node)
    shape = graph.shape(args["self"])
    return SEQUENCES if len(shape) == 3 and args["dim"] % 3 == 1 else None


def _emit_select(emission: Emission, node: fx.Node) -> Any:
    args = graph.arguments(node)
    tokens = graph.shape(args["self"])[1]
    count = emission.sequences if emission.sequences > 1 else None
    x = emission.values[args["self"]]
    return emission.builder.columns(x, args["index"] % tokens, tokens, count)


def _slice_family(node: fx.Node) -> str | None:
    args = graph.arguments(node)
    whole = len(graph.shape(node)) == 3 and args["dim"] % 3 == 1 and args["step"] == 1
    return SPATIAL if whole and graph.shape(node)[1] > 0 else None


def _emit_slice(emission: Emission, node: fx.Node) -> Any:
    args = graph.arguments(node)
    tokens, start = graph.shape(args["self"])[1], args["start"] or 0
    start = max(start + tokens, 0) if start < 0 else start
    return emission.builder.columns(emission.values[args["self"]], start, 1, graph.shape(node)[1])


def _part(node: Any) -> Tensor | None:
    """(features, tokens) of a constant part that is the same for every image."""
    constant = _weight(node)
    if constant is None or constant.dim() != 3 or not bool((constant == constant[:1]).all()):
        return None
    return constant[0].t().contiguous()


def _cat_family(node: fx.Node) -> str | None:
    args = graph.arguments(node)
    if len(graph.shape(node)) != 3 or args["dim"] % 3 != 1:
        return None
    for part in args["tensors"]:
        known = _part(part) is not None if part.op == "get_attr" else graph.is_float32(part)
        if not known:
            return None
    return SPATIAL


def _emit_cat(emission: Emission, node: fx.Node) -> Any:
    parts = []
    for part in graph.arguments(node)["tensors"]:
        constant = _part(part)
        value = emission.values[part] if constant is None else emission.builder.constant(constant)
        parts.append(value)
    return emission.builder.concat(parts)


TOKEN_OPS: dict[Any, NativeOp] = {
    ops.attention: NativeOp(_attention_family, _emit_attention),
    ops.to_tokens: NativeOp(_to_tokens_family, _emit_to_tokens),
    aten.layer_norm.default: NativeOp(_norm_family, _emit_norm),
    aten.add.Tensor: NativeOp(_sum_family, _emit_sum("add")),
    aten.mul.Tensor: NativeOp(_sum_family, _emit_sum("mul")),
    aten.select.int: NativeOp(_select_family, _emit_select),
    aten.slice.Tensor: NativeOp(_slice_family, _emit_slice),
    aten.cat.default: NativeOp(_cat_family, _emit_cat),
}
