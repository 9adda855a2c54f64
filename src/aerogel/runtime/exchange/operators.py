"""The table of operators that can be imported, and what a converter sees of a node.

A converter takes an `OnnxNode`, adds calls or layers to the graph under construction, and returns
the value (or values) that stand for the node's outputs. The calls are of plain functions on tensors
(see `values` for the small numbers among them); a call whose arguments are all constant is not
added but made at once, so that whatever a file computes from constants is folded by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from aerogel.runtime.exchange.names import scope_of
from aerogel.runtime.exchange.values import as_tensor


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor known at import time.

    Attributes:
        tensor: Its value.
        name: In the file; of folded results, that of the value they stand for.
    """

    tensor: Tensor
    name: str = ""


class Stored(Constant):
    """A constant that a call must get as a tensor, however small it is."""


Value = fx.Node | Constant
Output = Value | None | Sequence[Value | None]
Converter = Callable[["OnnxNode"], Any]

OPERATORS: dict[str, Converter] = {}
# Functions that yield numbers when all they are given is numbers.
HOST_AWARE: set[Callable[..., Any]] = set()


class UnsupportedError(ValueError):
    """A node that no converter covers."""


def register(*names: str) -> Callable[[Converter], Converter]:
    """Enter a converter for operators of the standard domain."""

    def enter(converter: Converter) -> Converter:
        OPERATORS.update(dict.fromkeys(names, converter))
        return converter

    return enter


def host_aware(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function of values that gives numbers for numbers."""
    HOST_AWARE.add(function)
    return function


class Target:
    """What converters build into; `builder.Builder` is the one there is."""

    def call(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        """Add a call, or make it now if all it gets is constant."""
        raise NotImplementedError

    def layer(self, path: str, key: Any, make: Callable[[], nn.Module], x: fx.Node) -> fx.Node:
        """Add a call of a layer; equal keys share one layer."""
        raise NotImplementedError

    def parameter(self, constant: Constant, transposed: bool = False) -> nn.Parameter:
        """A weight; matrices that several layers use stay one parameter."""
        raise NotImplementedError


_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16,
    6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64,
    12: torch.uint32, 13: torch.uint64, 14: torch.complex64, 15: torch.complex128,
    16: torch.bfloat16,
}  # fmt: skip


class OnnxNode:
    """One node of the file, with its inputs already converted.

    Args:
        op: Operator, of the standard domain.
        name: The node's; may be empty.
        opset: Version of the standard domain.
        inputs: Values; None where an optional input is left out.
        outputs: Names; "" where an optional output is left out.
        attributes: Decoded; tensors among them as `Tensor`.
        metadata: The exporter's notes.
        target: What is built.
    """

    def __init__(
        self,
        op: str,
        name: str,
        opset: int,
        inputs: Sequence[Value | None],
        outputs: Sequence[str],
        attributes: Mapping[str, Any],
        metadata: dict[str, str],
        target: Target,
    ) -> None:
        self.op, self.name, self.opset = op, name, opset
        self.inputs, self.outputs = list(inputs), list(outputs)
        self._attributes, self._metadata, self._target = attributes, metadata, target

    def fail(self, reason: str) -> NoReturn:
        """Refuse the node.

        Raises:
            UnsupportedError: Always; who calls adds the node's name.
        """
        raise UnsupportedError(reason)

    # Attributes

    def _attribute(self, name: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        value = self._attributes.get(name, default)
        if value is not default and not isinstance(value, kinds):
            self.fail(f"attribute {name} = {value!r}, expected {what}")
        return value

    def has(self, name: str) -> bool:
        """Whether the attribute is given."""
        return name in self._attributes

    def integer(self, name: str, default: Any) -> Any:
        """An attribute that is one whole number."""
        return self._attribute(name, default, (int,), "a whole number")

    def real(self, name: str, default: Any) -> Any:
        """An attribute that is one number."""
        return self._attribute(name, default, (float,), "a number")

    def text(self, name: str, default: str) -> str:
        """An attribute that is text."""
        return str(self._attribute(name, default, (str,), "text"))

    def ints(self, name: str, default: Any = None) -> Any:
        """An attribute that is a list of whole numbers."""
        value = self._attribute(name, default, (list,), "whole numbers")
        if value is not default and not all(isinstance(each, int) for each in value):
            self.fail(f"attribute {name} = {value!r}, expected whole numbers")
        return value

    def floats(self, name: str, default: Any = None) -> Any:
        """An attribute that is a list of numbers."""
        return self._attribute(name, default, (list,), "numbers")

    def tensor_attribute(self, name: str) -> Tensor | None:
        """An attribute that is a tensor."""
        value: Tensor | None = self._attribute(name, None, (Tensor,), "a tensor")
        return value

    def dtype(self, name: str) -> torch.dtype:
        """An attribute that names an element type."""
        code = self.integer(name, 0)
        if code not in _DTYPES:
            self.fail(f"attribute {name} = {code} is an element type that torch does not have here")
        return _DTYPES[code]

    # Inputs

    def optional(self, index: int) -> Value | None:
        """An input that may be left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def need(self, index: int) -> Value:
        """An input that must be there."""
        value = self.optional(index)
        if value is None:
            self.fail(f"input {index} is missing")
        return value

    def all_inputs(self) -> list[Value]:
        """Every input, none of which may be left out."""
        return [self.need(index) for index in range(len(self.inputs))]

    def tensor(self, index: int) -> Value:
        """An input as a tensor, even if what gives it yields numbers."""
        return self._as_tensor(self.need(index))

    def optional_tensor(self, index: int) -> Value | None:
        """Likewise, where the input may be left out."""
        value = self.optional(index)
        return None if value is None else self._as_tensor(value)

    def _as_tensor(self, value: Value) -> Value:
        if isinstance(value, Constant):
            return Stored(value.tensor, value.name)
        return self.call(as_tensor, value) if value.meta.get("host") else value

    def constant(self, index: int) -> Tensor | None:
        """An input's value if it is known now."""
        value = self.optional(index)
        return value.tensor if isinstance(value, Constant) else None

    def number(self, index: int) -> Any:
        """An input of one element: a Python number if it is known now; None if left out."""
        known = self.constant(index)
        if known is None:
            return self.optional(index)
        if known.numel() != 1:
            self.fail(f"input {index} has {known.numel()} elements, expected one")
        return known.item()

    def numbers(self, index: int, attribute: str | None = None) -> Any:
        """A list of whole numbers, given as an input or in older opsets as an attribute."""
        if attribute is not None and self.has(attribute):
            return self.ints(attribute)
        known = self.constant(index)
        return self.optional(index) if known is None else known.flatten().tolist()

    # Building

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Add a call of a function of values; a `Constant` if all arguments are constant."""
        hint = next((name for name in self.outputs if name), self.op)
        return self._target.call(hint, function, args, kwargs)

    def layer(self, x: Value, key: Sequence[Any], make: Callable[[], nn.Module]) -> Value:
        """Add a layer that is called with x.

        Args:
            x: Its input; of a constant the layer's output is computed now.
            key: What the layer depends on: nodes of the same operator and key share it.
            make: Builds it.
        """
        if isinstance(x, Constant):
            return Constant(make()(x.tensor).detach(), self.outputs[0])
        return self._target.layer(self.path(), (self.op, *key), make, x)

    def parameter(self, value: Value, transposed: bool = False) -> nn.Parameter:
        """A constant input as a layer's weight."""
        assert isinstance(value, Constant)
        return self._target.parameter(value, transposed)

    def path(self) -> str:
        """Where a layer made of this node belongs: as the file calls its weight, or the node."""
        for value in self.inputs[1:]:
            name = value.name if isinstance(value, Constant) else ""
            if name.endswith((".weight", ".bias")):
                scope = scope_of(self.name, self._metadata)
                owner = name.rpartition(".")[0]
                # An exporter stores equal vectors once, under the name of the first.
                return owner if name.endswith(".weight") or scope is None else scope
        weight = self.inputs[1] if len(self.inputs) > 1 else None
        named = weight.name if isinstance(weight, Constant) else ""
        return scope_of(self.name, self._metadata) or self.name or named or self.op.lower()

    def only_first_output(self) -> None:
        """Refuse nodes of which more than the first output is used.

        Raises:
            UnsupportedError: Another output has a name.
        """
        if any(self.outputs[1:]):
            self.fail("more outputs than the first are used")
