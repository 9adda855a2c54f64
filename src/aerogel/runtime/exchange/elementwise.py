"""ONNX operators that work number by number."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aerogel.runtime.exchange.operators import HOST_AWARE, OnnxNode, Value, register
from aerogel.runtime.exchange.values import as_tensor, broadcast, is_host


def _pair(a: Any, b: Any) -> tuple[Any, Any]:
    """Lists beside a tensor become tensors of its dtype; single numbers serve as they are."""
    if isinstance(a, list | tuple):
        a = as_tensor(a, like=b)
    if isinstance(b, list | tuple):
        b = as_tensor(b, like=a)
    return a, b


def _tensors(*values: Any) -> list[Tensor]:
    like = next((value for value in values if isinstance(value, Tensor)), None)
    return [as_tensor(value, like) for value in values]


def add(a: Any, b: Any) -> Any:
    """a + b."""
    return _arithmetic(operator.add, a, b)


def sub(a: Any, b: Any) -> Any:
    """a - b."""
    return _arithmetic(operator.sub, a, b)


def mul(a: Any, b: Any) -> Any:
    """a * b."""
    return _arithmetic(operator.mul, a, b)


def div(a: Any, b: Any) -> Any:
    """a / b; whole numbers are cut towards zero, as in C."""
    if is_host(a) and is_host(b):
        return broadcast(_div_numbers, a, b)
    a, b = _pair(a, b)
    whole = not any(
        each.is_floating_point() if isinstance(each, Tensor) else isinstance(each, float)
        for each in (a, b)
    )
    return torch.div(*_tensors(a, b), rounding_mode="trunc") if whole else a / b


def _div_numbers(a: Any, b: Any) -> Any:
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    return a // b if (a >= 0) == (b > 0) else -(-a // b)


def power(a: Any, b: Any) -> Any:
    """a ** b, in the dtype of a."""
    if is_host(a) and is_host(b):
        return broadcast(operator.pow, a, b)
    if is_host(a):
        return torch.pow(as_tensor(a), b)
    a, b = _pair(a, b)
    return (a**b).to(a.dtype)


def modulo(a: Any, b: Any, fmod: bool = False) -> Any:
    """Remainder with the sign of the divisor, or with `fmod` of the dividend."""
    if is_host(a) and is_host(b):
        return broadcast(math.fmod if fmod else operator.mod, a, b)
    function = torch.fmod if fmod else torch.remainder
    return function(*_tensors(a, b))


def minimum(*values: Any) -> Any:
    """The smallest of the values at each place."""
    return reduce(lambda a, b: _extreme(min, torch.minimum, a, b), values)


def maximum(*values: Any) -> Any:
    """The largest of the values at each place."""
    return reduce(lambda a, b: _extreme(max, torch.maximum, a, b), values)


def _extreme(host: Callable[..., Any], tensor: Callable[..., Any], a: Any, b: Any) -> Any:
    return broadcast(host, a, b) if is_host(a) and is_host(b) else tensor(*_tensors(a, b))


def total(*values: Any) -> Any:
    """The sum of the values at each place."""
    return reduce(add, values)


def average(*values: Any) -> Any:
    """The mean of the values at each place."""
    return div(total(*values), float(len(values)))


def _arithmetic(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    if is_host(a) and is_host(b):
        return broadcast(function, a, b)
    return function(*_pair(a, b))


def equal(a: Any, b: Any) -> Any:
    """a == b."""
    return _arithmetic(operator.eq, a, b)


def less(a: Any, b: Any) -> Any:
    """a < b."""
    return _arithmetic(operator.lt, a, b)


def less_or_equal(a: Any, b: Any) -> Any:
    """a <= b."""
    return _arithmetic(operator.le, a, b)


def greater(a: Any, b: Any) -> Any:
    """a > b."""
    return _arithmetic(operator.gt, a, b)


def greater_or_equal(a: Any, b: Any) -> Any:
    """a >= b."""
    return _arithmetic(operator.ge, a, b)


def logical_and(a: Any, b: Any) -> Any:
    """a and b."""
    if is_host(a) and is_host(b):
        return broadcast(lambda x, y: bool(x and y), a, b)
    return torch.logical_and(*_tensors(a, b))


def logical_or(a: Any, b: Any) -> Any:
    """a or b."""
    if is_host(a) and is_host(b):
        return broadcast(lambda x, y: bool(x or y), a, b)
    return torch.logical_or(*_tensors(a, b))


def logical_xor(a: Any, b: Any) -> Any:
    """Either a or b."""
    if is_host(a) and is_host(b):
        return broadcast(lambda x, y: bool(x) != bool(y), a, b)
    return torch.logical_xor(*_tensors(a, b))


def logical_not(a: Any) -> Any:
    """Not a."""
    return broadcast(operator.not_, a) if is_host(a) else torch.logical_not(a)


def negate(a: Any) -> Any:
    """-a."""
    return broadcast(operator.neg, a) if is_host(a) else -a


def where(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, b elsewhere."""
    if is_host(condition) and is_host(a) and is_host(b):
        return broadcast(lambda c, x, y: x if c else y, condition, a, b)
    return torch.where(as_tensor(condition), *_pair(a, b))


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The value in another dtype."""
    if not is_host(value):
        return value.to(dtype)
    if dtype == torch.bool:
        return broadcast(lambda x: x != 0, value)
    if dtype.is_floating_point:
        return broadcast(float, value)
    return broadcast(lambda x: x if isinstance(x, torch.SymInt) else int(x), value)


def clip(x: Any, low: Any, high: Any) -> Any:
    """Values held between two bounds, either of which may be None."""
    if low is None and high is None:
        return x
    if isinstance(low, Tensor) or isinstance(high, Tensor) or is_host(x):
        x = as_tensor(x)
        x = x if low is None else torch.maximum(x, as_tensor(low, like=x))
        return x if high is None else torch.minimum(x, as_tensor(high, like=x))
    return torch.clamp(x, low, high)


def hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    """A line, held between 0 and 1."""
    if math.isclose(alpha, 1 / 6, rel_tol=1e-4) and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def leaky(x: Tensor, slope: Any) -> Tensor:
    """x, or slope * x where it is negative; the slope broadcasts."""
    return torch.where(x > 0, x, slope * x)


def thresholded(x: Tensor, alpha: float) -> Tensor:
    """x where it is above alpha, else 0."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def is_inf(x: Tensor, negative: bool, positive: bool) -> Tensor:
    """Whether values are infinite, of the signs asked for."""
    return torch.logical_or(
        torch.logical_and(torch.isposinf(x), torch.tensor(positive)),
        torch.logical_and(torch.isneginf(x), torch.tensor(negative)),
    )


_PLAIN: dict[str, Callable[..., Any]] = {
    "Add": add, "Sub": sub, "Mul": mul, "Div": div, "Pow": power, "Sum": total, "Mean": average,
    "Min": minimum, "Max": maximum, "Equal": equal, "Less": less, "LessOrEqual": less_or_equal,
    "Greater": greater, "GreaterOrEqual": greater_or_equal, "And": logical_and, "Or": logical_or,
    "Xor": logical_xor, "Not": logical_not, "Neg": negate, "Where": where,
}  # fmt: skip
_TENSOR: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin,
    "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil,
    "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor,
    "HardSwish": F.hardswish, "IsNaN": torch.isnan, "Log": torch.log, "Mish": F.mish,
    "Reciprocal": torch.reciprocal, "Relu": F.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus,
    "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
    "BitwiseNot": torch.bitwise_not,
}  # fmt: skip

HOST_AWARE.update({*_PLAIN.values(), cast, modulo})


def _plain_call(function: Callable[..., Any]) -> Callable[[OnnxNode], Value]:
    return lambda node: node.call(function, *node.all_inputs())


def _tensor_call(function: Callable[..., Tensor]) -> Callable[[OnnxNode], Value]:
    return lambda node: node.call(function, *(node.tensor(i) for i in range(len(node.inputs))))


for _name, _function in _PLAIN.items():
    register(_name)(_plain_call(_function))
for _name, _function in _TENSOR.items():
    register(_name)(_tensor_call(_function))


@register("Mod")
def _mod(node: OnnxNode) -> Value:
    return node.call(modulo, *node.all_inputs(), fmod=bool(node.integer("fmod", 0)))


@register("Cast")
def _cast(node: OnnxNode) -> Value:
    return node.call(cast, node.need(0), node.dtype("to"))


@register("CastLike")
def _cast_like(node: OnnxNode) -> Value:
    return node.call(torch.Tensor.type_as, node.tensor(0), node.tensor(1))


@register("Clip")
def _clip(node: OnnxNode) -> Value:
    if node.opset < 11:
        low: Any = node.real("min", None)
        high: Any = node.real("max", None)
    else:
        low, high = (node.number(i) for i in (1, 2))
    x = node.need(0)
    if low == 0 and isinstance(low, int | float) and isinstance(high, int | float | None):
        if high == 6:
            return node.call(F.relu6, node.tensor(0))
        if high is None:
            return node.call(F.relu, node.tensor(0))
    return node.call(clip, x, low, high)


@register("LeakyRelu")
def _leaky_relu(node: OnnxNode) -> Value:
    return node.call(F.leaky_relu, node.tensor(0), node.real("alpha", 0.01))


@register("PRelu")
def _prelu(node: OnnxNode) -> Value:
    return node.call(leaky, node.tensor(0), node.need(1))


@register("ThresholdedRelu")
def _thresholded_relu(node: OnnxNode) -> Value:
    return node.call(thresholded, node.tensor(0), node.real("alpha", 1.0))


@register("Elu")
def _elu(node: OnnxNode) -> Value:
    return node.call(F.elu, node.tensor(0), node.real("alpha", 1.0))


@register("Celu")
def _celu(node: OnnxNode) -> Value:
    return node.call(F.celu, node.tensor(0), node.real("alpha", 1.0))


@register("Selu")
def _selu(node: OnnxNode) -> Value:
    alpha, gamma = node.real("alpha", 1.6732632), node.real("gamma", 1.0507010)
    if math.isclose(alpha, 1.6732632, rel_tol=1e-5) and math.isclose(gamma, 1.050701, rel_tol=1e-5):
        return node.call(F.selu, node.tensor(0))
    return node.call(mul, node.call(F.elu, node.tensor(0), alpha), gamma)


@register("HardSigmoid")
def _hard_sigmoid(node: OnnxNode) -> Value:
    return node.call(hard_sigmoid, node.tensor(0), node.real("alpha", 0.2), node.real("beta", 0.5))


@register("Gelu")
def _gelu(node: OnnxNode) -> Value:
    return node.call(F.gelu, node.tensor(0), approximate=node.text("approximate", "none"))


@register("Swish")
def _swish(node: OnnxNode) -> Value:
    alpha, x = node.real("alpha", 1.0), node.tensor(0)
    if alpha == 1.0:
        return node.call(F.silu, x)
    return node.call(mul, x, node.call(torch.sigmoid, node.call(mul, x, alpha)))


@register("IsInf")
def _is_inf(node: OnnxNode) -> Value:
    signs = bool(node.integer("detect_negative", 1)), bool(node.integer("detect_positive", 1))
    return node.call(is_inf, node.tensor(0), *signs)
