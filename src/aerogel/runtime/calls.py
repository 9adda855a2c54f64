"""How a model is called: example inputs in, leaves and their check, errors that name the input."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Inputs whose values torch.export writes into the graph.
_CONSTANTS = (
    *(int, float, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def normalize_example(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Accept one tensor, a tuple or list of positional inputs, or a mapping of keyword inputs.

    Raises:
        ValueError: `example_inputs` is none of these.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise ValueError(
        "example_inputs must be a tensor, a tuple of positional inputs or a dict of keyword "
        f"inputs, got {type(example_inputs).__name__}"
    )


def expected_call(model: nn.Module) -> str:
    """The signature of forward, as an error message shows it."""
    try:
        return f"{type(model).__name__}.forward{inspect.signature(model.forward)}"
    except (TypeError, ValueError):
        return f"{type(model).__name__}.forward(...)"


def run_example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's own outputs on the example.

    Raises:
        ValueError: The model refuses the inputs; names what it got and what forward expects.
    """
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"example_inputs {describe(args, kwargs)} do not fit {expected_call(model)}: {error}"
        ) from error
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"the model fails on example_inputs {describe(args, kwargs)}: {error}; "
            f"it expects {expected_call(model)}"
        ) from error


def describe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Inputs in a few words: "float32 (1, 3, 224, 224), mask=bool (1, 8)"."""
    words = [describe_leaf(each) for each in args]
    words += [f"{name}={describe_leaf(each)}" for name, each in kwargs.items()]
    return "(" + ", ".join(words) + ")"


def describe_leaf(leaf: Any) -> str:
    """One input in a few words."""
    if isinstance(leaf, Tensor):
        layout = "" if leaf.layout is torch.strided else f"{leaf.layout} ".removeprefix("torch.")
        return f"{layout}{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return repr(leaf) if isinstance(leaf, _CONSTANTS) else type(leaf).__name__


class CallPattern:
    """The way the example called the model; later calls are brought into the same form.

    Args:
        model: Whose forward gives the names.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Attributes:
        spec: Tree of (args, kwargs).
        leaves: What the example's inputs were; of tensors shape and dtype alone.
        names: One name per leaf.
        positional_tensors: How many, if the example was nothing but positional tensors; else -1.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.leaves = [_abstract(leaf) for leaf in leaves]
        self._signature = _signature(model)
        self._keywords = list(kwargs)
        self._positional = self._names_of(args)
        self.names = self._leaf_names(len(leaves))
        only_tensors = not kwargs and all(isinstance(each, Tensor) for each in args)
        self.positional_tensors = len(args) if only_tensors else -1

    def canonical(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The same inputs, positional and keyword as in the example, where that is possible."""
        if self._signature is None or self._positional is None:
            return args, kwargs
        if len(args) == len(self._positional) and list(kwargs) == self._keywords:
            return args, kwargs
        try:
            given = dict(self._signature.bind(*args, **kwargs).arguments)
        except TypeError:
            return args, kwargs
        if set(given) != {*self._positional, *self._keywords}:
            return args, kwargs
        ordered = tuple(given[name] for name in self._positional)
        return ordered, {name: given[name] for name in self._keywords}

    def check(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> None:
        """Refuse what no replanning can serve; inputs of another structure are the model's matter.

        Raises:
            ValueError: A tensor of another rank, or not on the CPU.
            TypeError: A tensor of another dtype or layout, or no tensor where there was one.
        """
        self.check_places(leaves)
        if spec != self.spec:
            return
        for name, leaf, expected in zip(self.names, leaves, self.leaves, strict=True):
            if not isinstance(expected, Tensor):
                continue
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"input {name!r} is {describe_leaf(leaf)}, expected {describe_leaf(expected)}"
                )
            if leaf.dtype != expected.dtype:
                raise TypeError(
                    f"input {name!r} is {describe_leaf(leaf)}, expected {describe_leaf(expected)} "
                    "(any sizes, same dtype and rank)"
                )
            if leaf.dim() != expected.dim():
                raise ValueError(
                    f"input {name!r} has shape {tuple(leaf.shape)}, expected "
                    f"{expected.dim()} dimensions as in {tuple(expected.shape)}"
                )

    def check_places(self, leaves: Sequence[Any]) -> None:
        """Refuse tensors that do not lie as the example's did; the message names the first.

        Raises:
            ValueError: Not on the CPU.
            TypeError: Of another layout, sparse say.
        """
        layouts = [each.layout if isinstance(each, Tensor) else None for each in self.leaves]
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            name = self.name_of(index)
            if leaf.device.type != "cpu":
                raise ValueError(f"input {name!r} is on {leaf.device}, expected it on the CPU")
            if len(leaves) == len(layouts) and layouts[index] not in (None, leaf.layout):
                raise TypeError(f"input {name!r} is {leaf.layout}, expected {layouts[index]}")

    def name_of(self, index: int) -> str:
        """What an error calls the input with this number among the leaves."""
        return self.names[index] if index < len(self.names) else f"input {index}"

    def _names_of(self, args: tuple[Any, ...]) -> list[str] | None:
        """Parameter names of the positional inputs; None where *args swallows some of them."""
        if self._signature is None:
            return None
        by_position = (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
        names = [p.name for p in self._signature.parameters.values() if p.kind in by_position]
        return names[: len(args)] if len(names) >= len(args) else None

    def _leaf_names(self, count: int) -> tuple[str, ...]:
        names = [*(self._positional or []), *self._keywords]
        return tuple(names) if len(names) == count else tuple(f"input {i}" for i in range(count))


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


def _abstract(leaf: Any) -> Any:
    """Shape and dtype without the data, so that an example is not kept alive."""
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf


def leaf_key(leaf: Any) -> Any:
    """What a program is specialised on.

    Shape and dtype of a tensor, the value of what torch.export takes as a constant (1, 1.0 and True
    are three), and of all else, which it refuses, the type.
    """
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    return (type(leaf), leaf) if isinstance(leaf, _CONSTANTS) else type(leaf)
