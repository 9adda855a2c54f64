"""What each layer and function does to channels.

A rule gets an `Op` and returns the `Value` of its result: a dict axis -> channel ids, a list of
them for a tuple, or None for what is no tensor. Operations without a rule pin all they touch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from aerogel.sparsity.channels import moves
from aerogel.sparsity.channels.graph import ChannelGraph, Channels, Op, Value

_ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh,
    nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Mish, nn.CELU, nn.SELU, nn.Hardtanh, nn.LogSigmoid,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.Softmax, nn.LogSoftmax, nn.Softsign, nn.Hardshrink, nn.Softshrink, nn.Threshold,
)  # fmt: skip
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_PADS = (
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
)

# Names of functions and methods (without "torch.", "F.", a trailing "_") that act entry by entry,
# or symmetrically along an axis (softmax, normalize).
_ELEMENTWISE = {
    "relu", "relu6", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "elu",
    "leaky_relu", "softplus", "mish", "celu", "selu", "hardtanh", "logsigmoid", "abs", "neg",
    "exp", "log", "log1p", "sqrt", "rsqrt", "square", "reciprocal", "sin", "cos", "erf", "sign",
    "clamp", "clip", "clamp_min", "clamp_max", "contiguous", "clone", "detach", "to", "float",
    "double", "half", "bfloat16", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "feature_dropout", "alpha_dropout", "softmax", "log_softmax", "normalize", "requires_grad",
    "identity", "cpu",
}  # fmt: skip
_BROADCAST = {
    "add", "sub", "rsub", "mul", "div", "truediv", "true_divide", "divide", "multiply",
    "subtract", "maximum", "minimum", "pow", "where", "iadd", "isub", "imul", "itruediv", "eq",
    "ne", "lt", "le", "gt", "ge",
}  # fmt: skip
_REDUCE = {"mean", "sum", "amax", "amin", "std", "var", "prod", "logsumexp"}
_REORDER = {"permute", "transpose", "swapaxes", "swapdims", "t", "movedim", "moveaxis", "adjoint"}
_RESHAPE = {"flatten", "view", "reshape", "unflatten", "ravel"}

_Rule = Callable[[Op], Any]


def apply_rule(op: Op) -> Any:
    """The channels of a node's result."""
    node, result = op.node, op.result
    if node.op == "placeholder":
        return op.pinned()
    if node.op == "get_attr":
        if not isinstance(result, Tensor) or not op.graph.owns(result):
            return {} if isinstance(result, Tensor) else None
        return {d: op.graph.axis(result, d) for d, size in enumerate(result.shape) if size > 1}
    rule = _module_rule(op.module) if node.op == "call_module" else _function_rule(node)
    return op.pinned() if rule is None else rule(op)


def _module_rule(module: nn.Module | None) -> _Rule | None:
    kinds: list[tuple[Any, _Rule]] = [
        (_ELEMENTWISE_MODULES, moves.same),
        (_CONVS, _conv),
        (_TRANSPOSED, _conv_transposed),
        (nn.Linear, _linear),
        (_BATCH_NORMS, _batch_norm),
        (nn.GroupNorm, _group_norm),
        ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
        (nn.PReLU, _prelu),
        (nn.Embedding, _embedding),
        (nn.MultiheadAttention, _attention),
        (nn.Flatten, moves.reshape),
        (nn.Unflatten, moves.reshape),
        (nn.GLU, moves.glu),
        (_PADS, moves.pad),
        ((nn.Upsample,), moves.spatial),
    ]
    for kind, rule in kinds:
        if isinstance(module, kind):
            return rule
    return moves.pool if re.search(r"(Avg|Max)Pool[123]d$", type(module).__name__) else None


def _function_rule(node: fx.Node) -> _Rule | None:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    name = name.strip("_")
    for names, rule in (
        (_ELEMENTWISE, moves.same),
        (_BROADCAST, moves.join),
        (_REDUCE, moves.reduce),
        (_REORDER, moves.reorder),
        (_RESHAPE, moves.reshape),
    ):
        if name in names:
            return rule
    if re.fullmatch(r"(adaptive_)?(avg|max)_pool[123]d", name):
        return moves.pool
    return _FUNCTIONS.get(name)


def _linear(op: Op) -> Value:
    weight, value, last = op.module.weight, op.x.meta["channels"], len(op.shape) - 1
    op.graph.tie(value.get(last), op.graph.axis(weight, 1))
    out = op.graph.axis(weight, 0)
    op.tie_params(op.module, "bias", 0, out)
    return {**{d: c for d, c in value.items() if d != last}, last: out}


def _conv(op: Op) -> Value:
    conv = op.module
    weight, groups = conv.weight, conv.groups
    channel = len(op.shape) - len(conv.kernel_size) - 1
    value = op.keep(op.x.meta["channels"], (channel,))
    incoming, graph = value.get(channel), op.graph
    out: Channels | None = graph.axis(weight, 0)
    if groups == 1:
        graph.tie(incoming, graph.axis(weight, 1))
    elif groups == conv.in_channels:  # depthwise: output j belongs to input j // multiplier
        times = conv.out_channels // conv.in_channels
        spread = None if incoming is None else [c for c in incoming for _ in range(times)]
        graph.tie(spread, out)
    else:
        _tie_groups(graph, weight, groups, incoming)
    op.tie_params(conv, "bias", 0, out)
    return {channel: graph.axis(weight, 0)}


def _tie_groups(
    graph: ChannelGraph, weight: Tensor, groups: int, incoming: Channels | None
) -> None:
    """Channels of a grouped convolution move inside their group only."""
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    for group in range(groups):
        span = (group * rows, (group + 1) * rows)
        part = None if incoming is None else incoming[group * columns : (group + 1) * columns]
        graph.tie(part, graph.axis(weight, 1, span))
        graph.note(graph.axis(weight, 0)[slice(*span)])


def _conv_transposed(op: Op) -> Any:
    conv = op.module
    if conv.groups != 1:
        op.graph.pin(op.graph.axis(conv.weight, 0))
        return op.pinned()
    channel = len(op.shape) - len(conv.kernel_size) - 1
    value = op.keep(op.x.meta["channels"], (channel,))
    op.graph.tie(value.get(channel), op.graph.axis(conv.weight, 0))
    out = op.graph.axis(conv.weight, 1)
    op.tie_params(conv, "bias", 0, out)
    return {channel: out}


def _batch_norm(op: Op) -> Value:
    value = dict(op.x.meta["channels"])
    channel = 1 if len(op.shape) > 1 else 0
    op.tie_params(op.module, "weight bias running_mean running_var", 0, value.get(channel))
    return value


def _group_norm(op: Op) -> Value:
    value = dict(op.x.meta["channels"])
    channels = value.get(1)
    op.tie_params(op.module, "weight bias", 0, channels)
    if channels is not None:
        size = len(channels) // op.module.num_groups
        for start in range(0, len(channels), size):
            op.graph.note(channels[start : start + size])
    return value


def _layer_norm(op: Op) -> Value:
    value = dict(op.x.meta["channels"])
    first = len(op.shape) - len(op.module.normalized_shape)
    for dim in range(first, len(op.shape)):
        op.tie_params(op.module, "weight bias", dim - first, value.get(dim))
    return value


def _prelu(op: Op) -> Value:
    value = dict(op.x.meta["channels"])
    if op.module.num_parameters > 1:
        op.tie_params(op.module, "weight", 0, value.get(1))
    return value


def _embedding(op: Op) -> Value:
    return {len(op.shape) - 1: op.graph.axis(op.module.weight, 1)}


def _attention(op: Op) -> Any:
    """torch's attention: inputs are consumed feature by feature, heads stay in place."""
    attention, graph = op.module, op.graph
    width = attention.embed_dim
    for index, name in enumerate(("query", "key", "value")):
        node = op.argument(index, name)
        last = len(node.meta["shapes"]) - 1
        channels = op.keep(node.meta["channels"], (last,)).get(last)
        if attention._qkv_same_embed_dim:
            span = (index * width, (index + 1) * width)
            graph.tie(channels, graph.axis(attention.in_proj_weight, 1, span))
        else:
            projection = getattr(attention, f"{name[0]}_proj_weight")
            graph.tie(channels, graph.axis(projection, 1))
    out = graph.axis(attention.out_proj.weight, 0)
    op.tie_params(attention.out_proj, "bias", 0, out)
    return [{op.result[0].ndim - 1: out}, {}]


_FUNCTIONS: dict[str, _Rule] = {
    "linear": moves.functional_linear,
    "cat": moves.cat,
    "concat": moves.cat,
    "concatenate": moves.cat,
    "chunk": moves.split,
    "split": moves.split,
    "getitem": moves.getitem,
    "getattr": moves.attribute,
    "squeeze": moves.squeeze,
    "unsqueeze": moves.unsqueeze,
    "expand": moves.expand,
    "glu": moves.glu,
    "pad": moves.pad,
    "interpolate": moves.spatial,
}


def has_tensor(result: Any) -> bool:
    """Whether a result is a tensor or a tuple or list with one in it."""
    if isinstance(result, (tuple, list)):
        return any(has_tensor(part) for part in result)
    return isinstance(result, Tensor)
