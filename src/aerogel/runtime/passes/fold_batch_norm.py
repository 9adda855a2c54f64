"""Batch norm at inference is an affine map per channel: it goes into the layer before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from aerogel.runtime import graph, ops

aten = torch.ops.aten
_INFERENCE_ONLY = aten._native_batch_norm_legit_no_training.default


def fold_batch_norm(gm: fx.GraphModule) -> fx.GraphModule:
    """Fold each batch norm into the conv2d or linear that alone feeds it.

    The layer gets a weight of its own, so one shared by several layers stays right for all.
    Zeros stay zeros: a row of the weight is only scaled.
    """
    gm = graph.clone(gm)
    for norm in list(graph.calls(gm, aten.batch_norm.default, _INFERENCE_ONLY)):
        layer = norm.args[0]
        if _is_foldable(gm, norm, layer):
            _fold(gm, norm, layer)  # type: ignore[arg-type]
    return graph.tidy(gm)


def _is_foldable(gm: fx.GraphModule, norm: fx.Node, layer: Any) -> bool:
    if not isinstance(layer, fx.Node) or layer.target not in (ops.conv2d, ops.linear):
        return False
    if graph.only_user(layer) is not norm or graph.constant(gm, layer.args[1]) is None:
        return False
    if layer.target is ops.linear and len(graph.shape(layer)) != 2:
        return False  # over (batch, tokens, features) batch norm counts tokens as channels
    args = graph.arguments(norm)
    if args.get("training"):
        return False
    statistics = (args["running_mean"], args["running_var"])
    return all(graph.constant(gm, each) is not None for each in statistics)


def _fold(gm: fx.GraphModule, norm: fx.Node, layer: fx.Node) -> None:
    args = graph.arguments(norm)
    scale, shift = _affine(gm, args)
    weight = graph.constant(gm, layer.args[1])
    bias = graph.constant(gm, layer.args[2])
    assert weight is not None
    scaled = weight.detach().double() * scale.view(-1, *[1] * (weight.dim() - 1))
    shifted = shift if bias is None else shift + bias.detach().double() * scale
    name = layer.meta.get("layer", layer.name)
    new_weight = graph.add_constant(gm, f"{name}_folded", scaled.to(weight.dtype), layer)
    new_bias = graph.add_constant(gm, f"{name}_folded_bias", shifted.to(weight.dtype), layer)
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
    for result in _results(norm):
        result.replace_all_uses_with(layer)


def _affine(gm: fx.GraphModule, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel in double precision, as two roundings would show."""
    mean, variance = (
        graph.constant(gm, args[name]).detach().double()  # type: ignore[union-attr]
        for name in ("running_mean", "running_var")
    )
    gamma, beta = graph.constant(gm, args["weight"]), graph.constant(gm, args["bias"])
    scale = (variance + args["eps"]).rsqrt()
    scale = scale if gamma is None else scale * gamma.detach().double()
    shift = -mean * scale
    return scale, shift if beta is None else shift + beta.detach().double()


def _results(norm: fx.Node) -> list[fx.Node]:
    """Where the normalised tensor is read: the node itself, or item 0 of the tuple form."""
    if norm.target is not _INFERENCE_ONLY:
        return [norm]
    return [user for user in norm.users if user.args[1] == 0]
