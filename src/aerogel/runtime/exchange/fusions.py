"""What exporters take apart, put together again: biases, activations, norms, attention.

Older opsets have no GELU, no SiLU, no layer normalisation and no attention, so a file spells them
out in additions and products. As one operator each they are faster everywhere, and `compile` knows
them. Every rewrite gives the same function up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from aerogel.runtime.exchange.elementwise import add, div, hard_sigmoid, mul, power, sub
from aerogel.runtime.exchange.reductions import reduced

_BIASED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CLOSE = 1e-3  # constants are rounded to float16 at worst


def calls(gm: fx.GraphModule, *functions: Any) -> Iterator[Any]:
    """The calls of some functions, in order; safe to edit meanwhile."""
    for node in list(gm.graph.nodes):
        if is_call(node, *functions) and (node.users or node.op == "output"):
            yield node


def is_call(value: Any, *functions: Any) -> bool:
    """Whether a value is a call of one of some functions."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in functions


def is_close(value: Any, number: float) -> bool:
    """Whether a value is this number, as a file would round it."""
    return isinstance(value, int | float) and math.isclose(value, number, rel_tol=_CLOSE)


def with_number(value: Any, function: Any, number: float | None = None) -> tuple[Any, float] | None:
    """(operand, number) of a call of a commutative function with a number on either side."""
    if not is_call(value, function):
        return None
    first, second = value.args
    for operand, given in ((first, second), (second, first)):
        if isinstance(given, int | float) and (number is None or is_close(given, number)):
            return operand, float(given)
    return None


def replace(node: fx.Node, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Put a call in the place of a node."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, args, kwargs)
    node.replace_all_uses_with(new)
    return new


def attribute(gm: fx.GraphModule, value: Any) -> Tensor | None:
    """The stored tensor that a value is, if it is one."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    found: Any = gm
    for part in str(value.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, Tensor) else None


# Numbers


def _inline_numbers(gm: fx.GraphModule) -> None:
    """Stored tensors of one element become numbers where that cannot change a shape."""
    for node in calls(gm, add, sub, mul, div, power):
        for index, (value, other) in enumerate((node.args, node.args[::-1])):
            stored = attribute(gm, value)
            if stored is None or stored.dtype not in (torch.float32, torch.float64):
                continue
            if tuple(stored.shape) == (1,) and _has_axes(other):
                node.update_arg(index, stored.item())


def _has_axes(value: Any) -> bool:
    """Whether a value is known to be no scalar: what layers give, and what is made of that."""
    for _ in range(64):
        if not isinstance(value, fx.Node):
            return False
        if value.op == "call_module":
            return True
        if not is_call(value, add, sub, mul, div, F.relu, F.relu6, torch.sigmoid, hard_sigmoid):
            return False
        nodes = [each for each in value.args if isinstance(each, fx.Node)]
        value = nodes[0] if nodes else None
    return False


# Biases


def _fuse_bias(gm: fx.GraphModule) -> None:
    """A constant added to a layer's result is the layer's bias."""
    uses = [node.target for node in gm.graph.nodes if node.op == "call_module"]
    for node in calls(gm, add):
        for source, constant in (node.args, node.args[::-1]):
            values = attribute(gm, constant)
            if values is None or not isinstance(source, fx.Node) or source.op != "call_module":
                continue
            layer: Any = gm.get_submodule(str(source.target))
            alone = len(source.users) == 1 and uses.count(source.target) == 1
            if not (alone and isinstance(layer, _BIASED) and layer.bias is None):
                continue
            if _is_bias(layer, values) and values.dtype == layer.weight.dtype:
                layer.bias = nn.Parameter(values.detach().reshape(-1).clone())
                node.replace_all_uses_with(source)
                break


def _is_bias(layer: Any, values: Tensor) -> bool:
    outputs = layer.weight.shape[0]
    if isinstance(layer, nn.Linear):
        return values.shape == (outputs,)
    spatial = (1,) * (layer.weight.dim() - 2)
    return tuple(values.shape) in ((1, outputs, *spatial), (outputs, *spatial))


# Activations


def _factors(value: Any, stop: Any) -> list[Any]:
    """What a nest of products multiplies; `stop` is not taken apart."""
    if value is stop or not is_call(value, mul, div):
        return [value]
    first, second = value.args
    if value.target is div:
        if not isinstance(second, int | float) or second == 0:
            return [value]
        return [*_factors(first, stop), 1.0 / second]
    return [*_factors(first, stop), *_factors(second, stop)]


def _fuse_gelu(gm: fx.GraphModule) -> None:
    """x * 0.5 * (1 + erf(x / sqrt(2))), and the same with tanh."""
    for node in calls(gm, torch.erf, torch.tanh):
        erf = node.target is torch.erf
        x = _erf_source(node.args[0]) if erf else _tanh_source(node.args[0])
        if x is None:
            continue
        for one_more in [user for user in node.users if with_number(user, add, 1.0)]:
            whole = _product_of(one_more, x)
            if whole is not None:
                replace(whole, F.gelu, x, approximate="none" if erf else "tanh")


def _erf_source(value: Any) -> Any:
    found = with_number(value, mul, math.sqrt(0.5))
    if found is not None:
        return found[0]
    is_quotient = is_call(value, div) and is_close(value.args[1], math.sqrt(2.0))
    return value.args[0] if is_quotient else None


def _tanh_source(value: Any) -> Any:
    """x of sqrt(2 / pi) * (x + 0.044715 * x ** 3)."""
    outer = with_number(value, mul, math.sqrt(2.0 / math.pi))
    if outer is None or not is_call(outer[0], add):
        return None
    first, second = outer[0].args
    for x, term in ((first, second), (second, first)):
        cubic = with_number(term, mul, 0.044715)
        if cubic is not None and _is_cube(cubic[0], x):
            return x
    return None


def _is_cube(value: Any, x: Any) -> bool:
    if is_call(value, power):
        return value.args[0] is x and is_close(value.args[1], 3.0)
    return is_call(value, mul) and [each is x for each in _factors(value, x)] == [True] * 3


def _product_of(one_more: Any, x: Any) -> Any:
    """The node above that is exactly 0.5 * x * one_more."""
    node = one_more
    for _ in range(3):
        above = [user for user in node.users if is_call(user, mul, div)]
        if len(above) != 1:
            return None
        node = above[0]
        rest = list(_factors(node, x))
        numbers = [each for each in rest if isinstance(each, int | float)]
        values = [each for each in rest if not isinstance(each, int | float)]
        if set(values) == {x, one_more} and len(values) == 2 and is_close(math.prod(numbers), 0.5):
            return node
    return None


def _fuse_hard(gm: fx.GraphModule) -> None:
    """relu6(x + 3) / 6, and x times that."""
    for node in calls(gm, mul, div):
        for x in _gate_sources(node):
            rest = _factors(node, x)
            gates = [each for each in rest if _is_gate(each, x)]
            numbers = [each for each in rest if isinstance(each, int | float)]
            if len(gates) != 1 or not is_close(math.prod(numbers), 1 / 6):
                continue
            others = [each for each in rest if each not in gates and each not in numbers]
            if others in ([], [x]):
                replace(node, F.hardswish if others else F.hardsigmoid, x)
                break
    for node in calls(gm, mul):
        for x, gate in (node.args, node.args[::-1]):
            whole = is_call(gate, F.hardsigmoid) and gate.args[0] is x
            if whole or (is_call(gate, hard_sigmoid) and gate.args[0] is x and _is_sixth(gate)):
                replace(node, F.hardswish, x)
                break


def _is_sixth(gate: Any) -> bool:
    return is_close(gate.args[1], 1 / 6) and is_close(gate.args[2], 0.5)


def _gate_sources(node: Any) -> list[Any]:
    """What the relu6 gates below a product look at."""
    found = []
    for each in _factors(node, None):
        inner = with_number(each.args[0], add, 3.0) if is_call(each, F.relu6) else None
        if inner is not None:
            found.append(inner[0])
    return found


def _is_gate(value: Any, x: Any) -> bool:
    inner = with_number(value.args[0], add, 3.0) if is_call(value, F.relu6) else None
    return inner is not None and inner[0] is x


def _fuse_silu(gm: fx.GraphModule) -> None:
    """x * sigmoid(x)."""
    for node in calls(gm, mul):
        for x, gate in (node.args, node.args[::-1]):
            if is_call(gate, torch.sigmoid) and gate.args[0] is x:
                replace(node, F.silu, x)
                break


# Layer normalisation


def _fuse_layer_norm(gm: fx.GraphModule) -> None:
    """(x - mean) / sqrt(mean((x - mean) ** 2) + epsilon), then scale and shift."""
    for node in calls(gm, div):
        found = _normalised(node)
        if found is None:
            continue
        x, epsilon = found
        scaled = _only(node, mul)
        scale = None if scaled is None else _other(gm, scaled, node)
        if scaled is None or scale is None or scale.dim() != 1:
            continue
        shifted = _only(scaled, add)
        shift = None if shifted is None else _other(gm, shifted, scaled)
        if shift is not None and shift.shape != scale.shape:
            shift = None
        layer = nn.LayerNorm(scale.shape, eps=epsilon, bias=shift is not None)
        layer.weight = nn.Parameter(scale.detach().clone())
        if shift is not None:
            layer.bias = nn.Parameter(shift.detach().clone())
        replaced = (scaled,) if shift is None or shifted is None else (scaled, shifted)
        constant = next(each for each in scaled.args if each is not node)
        _insert_norm(gm, replaced, constant, layer, x)


def _normalised(node: Any) -> tuple[Any, float] | None:
    """(x, epsilon) if a quotient is what normalises x over its last axis."""
    centred, root = node.args
    if not is_call(centred, sub) or not is_call(root, torch.sqrt):
        return None
    x, mean = centred.args
    shifted = with_number(root.args[0], add)
    if shifted is None or _mean_source(mean) is not x:
        return None
    square: Any = _mean_source(shifted[0])
    is_power = is_call(square, power) and is_close(square.args[1], 2.0)
    is_product = is_call(square, mul) and square.args[0] is square.args[1]
    base: Any = square.args[0] if is_power or is_product else None
    # Some exporters subtract the mean once for each of its two uses.
    same = base is centred or (is_call(base, sub) and base.args == centred.args)
    return (x, shifted[1]) if same else None


def _mean_source(value: Any) -> Any:
    """What a value is the mean of, over the last axis, which is kept."""
    if not is_call(value, reduced):
        return None
    x, kind, axes, keep = (*value.args, None, None)[:4]
    return x if kind == "mean" and list(axes or ()) == [-1] and keep else None


def _only(node: Any, function: Any) -> Any:
    users = list(node.users)
    return users[0] if len(users) == 1 and is_call(users[0], function) else None


def _other(gm: fx.GraphModule, node: Any, operand: Any) -> Tensor | None:
    """The stored operand beside another."""
    first, second = node.args
    return attribute(gm, second if first is operand else first)


def _insert_norm(
    gm: fx.GraphModule, replaced: tuple[Any, ...], scale: Any, layer: nn.LayerNorm, x: Any
) -> None:
    """Put the layer where its weight stood, so that the weight keeps its name."""
    name = str(scale.target)
    path = name.removesuffix(".weight") if name.endswith(".weight") else f"{name}_norm"
    others = [
        node
        for node in gm.graph.nodes
        if node.op == "get_attr" and str(node.target).startswith(f"{path}.")
        if set(node.users) - set(replaced)
    ]
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    if others or any(f"{target}.".startswith(f"{path}.") for target in called):
        path += "_norm"
        while _exists(gm, path):
            path += "_"
    last = replaced[-1]
    gm.add_submodule(path, layer)
    with gm.graph.inserting_before(last):
        call = gm.graph.call_module(path, (x,))
    last.replace_all_uses_with(call)


def _exists(gm: fx.GraphModule, path: str) -> bool:
    owner, _, leaf = path.rpartition(".")
    return hasattr(gm.get_submodule(owner), leaf)


# In this order: later ones look for what earlier ones have made.
REWRITES: tuple[Callable[[fx.GraphModule], None], ...] = (
    _inline_numbers,
    _fuse_bias,
    _fuse_gelu,
    _fuse_hard,
    _fuse_silu,
    _fuse_layer_norm,
)
