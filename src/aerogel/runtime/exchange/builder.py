"""The graph under construction: calls, layers, weights, and the folding of constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from aerogel.runtime.exchange.names import Places, identifier, module_path
from aerogel.runtime.exchange.operators import HOST_AWARE, Constant, Stored, Target, Value
from aerogel.runtime.exchange.values import MAX_ELEMENTS, as_tensor

# Lists of whole numbers up to this long are arguments; longer ones are tensors.
_MAX_INLINE = 64
# Larger numbers are what exporters put into masks, not weights.
_MAX_WEIGHT = 1e30
_INLINE_DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)


class Builder(Target):
    """Collects calls and layers; `finish` gives the module."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self._places = Places()
        self._layers: dict[Any, str] = {}
        self._parameters: dict[tuple[int, bool], nn.Parameter] = {}
        self._attributes: dict[int, str] = {}
        self._kept: list[Constant] = []  # ids of constants are keys: they must stay alive

    def placeholder(self, name: str) -> fx.Node:
        """An input; its node's name is the argument's."""
        return self.graph.placeholder(identifier(name))

    def call(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        """Add a call, or make it now if all it gets is constant."""
        leaves = pytree.tree_leaves((args, kwargs))
        nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
        if not nodes:
            return self._fold(name, function, args, kwargs)
        args, kwargs = pytree.tree_map(self._operand, (args, kwargs))
        node = self.graph.create_node("call_function", function, args, kwargs, identifier(name))
        # What is left of constants beside the nodes is numbers: lists and scalars alike.
        constants = [leaf for leaf in leaves if isinstance(leaf, Constant)]
        inline = all(self._is_inline(each) for each in constants)
        all_host = inline and all(each.meta.get("host", False) for each in nodes)
        node.meta["host"] = function in HOST_AWARE and all_host
        return node

    def item(self, node: fx.Node, index: int, name: str) -> fx.Node:
        """One of several results."""
        import operator

        return self.graph.create_node(
            "call_function", operator.getitem, (node, index), {}, identifier(name)
        )

    def layer(self, path: str, key: Any, make: Callable[[], nn.Module], x: fx.Node) -> fx.Node:
        """Add a call of a layer; equal keys share one layer."""
        place = self._layers.get(key)
        if place is None:
            place = self._layers[key] = self._places.take(module_path(path))
            self._put(place, make())
        return self.graph.call_module(place, (x,))

    def parameter(self, constant: Constant, transposed: bool = False) -> nn.Parameter:
        """A weight. Matrices stay shared, as a tied embedding is.

        Vectors do not: exporters store equal ones (biases of zeros) once, and layers that happened
        to start alike must not be tied when they train.
        """
        key = (id(constant), transposed)
        if key in self._parameters and constant.tensor.dim() > 1:
            return self._parameters[key]
        tensor = constant.tensor.detach()
        value = tensor.t().contiguous() if transposed else tensor.clone()
        parameter = nn.Parameter(value, requires_grad=value.is_floating_point())
        self._parameters[key] = parameter
        self._kept.append(constant)
        return parameter

    def finish(self, outputs: list[Value], class_name: str) -> fx.GraphModule:
        """The module: one output, or a tuple of several."""
        results = [self._operand(Stored(each.tensor, each.name)) if isinstance(each, Constant)
                   else self._tensor(each) for each in outputs]  # fmt: skip
        self.graph.output(results[0] if len(results) == 1 else tuple(results))
        module = fx.GraphModule(self.root, self.graph, class_name)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        return fx.GraphModule(module, module.graph, class_name)  # takes only what is still used

    def _tensor(self, node: fx.Node) -> fx.Node:
        return self.graph.call_function(as_tensor, (node,)) if node.meta.get("host") else node

    def _fold(self, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.tensor if isinstance(leaf, Constant) else leaf, (args, kwargs)
        )
        with torch.no_grad():
            result = function(*args, **kwargs)
        if isinstance(result, list | tuple) and any(isinstance(each, Tensor) for each in result):
            return tuple(self._folded(each, name) for each in result)
        return self._folded(result, name)

    @staticmethod
    def _folded(result: Any, name: str) -> Constant:
        tensor = as_tensor(result)
        if tensor.numel() > MAX_ELEMENTS:
            raise ValueError(f"constants are combined into a tensor of {tuple(tensor.shape)}")
        return Constant(tensor, name)

    @staticmethod
    def _is_inline(constant: Constant) -> bool:
        tensor = constant.tensor
        if isinstance(constant, Stored) or tensor.dtype not in _INLINE_DTYPES:
            return False
        if tensor.dim() == 0:
            return True
        small = tensor.dim() == 1 and tensor.numel() <= _MAX_INLINE
        return small and not tensor.is_floating_point()

    def _operand(self, value: Any) -> Any:
        """What a call gets for a constant: numbers, or a node that reads the stored tensor."""
        if not isinstance(value, Constant):
            return value
        if self._is_inline(value):
            return value.tensor.tolist()
        key = id(value.tensor)
        if key not in self._attributes:
            self._attributes[key] = self._places.take(module_path(value.name))
            self._put(self._attributes[key], self._attribute(value))
            self._kept.append(value)
        return self.graph.get_attr(self._attributes[key])

    def _attribute(self, value: Constant) -> Tensor | nn.Parameter:
        """Arrays of numbers that could be trained are parameters; tables and masks are not."""
        tensor = value.tensor.detach()
        if not tensor.is_floating_point() or tensor.numel() < 2:
            return tensor
        if not bool((tensor.abs() < _MAX_WEIGHT).all()):
            return tensor
        return nn.Parameter(tensor.clone())

    def _put(self, path: str, value: Any) -> None:
        *owners, leaf = path.split(".")
        owner = self.root
        for part in owners:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            owner.register_buffer(leaf, value)
        else:
            setattr(owner, leaf, value)
