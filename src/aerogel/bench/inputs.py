"""Example inputs of a network, and the file in which they go to another process."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

Example = Tensor | Sequence[Any] | Mapping[str, Any]
Call = Callable[[], Any]


class NotApplicable(Exception):
    """An engine has nothing of its own to offer for this network; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """Example inputs as a call's arguments."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Example) -> Inputs:
        """Take a tensor, a sequence of arguments, or a mapping of keyword arguments."""
        if isinstance(example, Tensor):
            return cls((example,))
        if isinstance(example, Mapping):
            return cls(kwargs=dict(example))
        if isinstance(example, Sequence) and not isinstance(example, str):
            return cls(tuple(example))
        raise TypeError(
            "example_inputs must be a tensor, a sequence of arguments or a mapping of keyword "
            f"arguments, got {type(example).__name__}"
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, in order."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs))
                if isinstance(leaf, Tensor)]  # fmt: skip

    @property
    def keywords(self) -> list[str | None]:
        """For each of the tensors the keyword it is passed by, where it is."""
        plain = [None for leaf in pytree.tree_leaves(self.args) if isinstance(leaf, Tensor)]
        named = [
            name if value is leaf else None
            for name, value in self.kwargs.items()
            for leaf in pytree.tree_leaves(value)
            if isinstance(leaf, Tensor)
        ]
        return [*plain, *named]

    @property
    def batch(self) -> int | None:
        """Size of the first tensor's first dimension."""
        return next((int(t.shape[0]) for t in self.tensors if t.ndim), None)

    def save(self, path: Path) -> None:
        """Write to a safetensors file: tensors by number, and around them the arguments as JSON.

        Raises:
            NotApplicable: An argument is neither a tensor nor a JSON value.
        """
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        numbers = itertools.count()
        plain = [{"tensor": str(next(numbers))} if isinstance(leaf, Tensor) else {"value": leaf}
                 for leaf in leaves]  # fmt: skip
        try:
            structure = json.dumps({"leaves": plain, "spec": pytree.treespec_dumps(spec)})
        except (TypeError, NotImplementedError) as error:
            raise NotApplicable(f"its inputs cannot go to another process: {error}") from None
        save_tensors(self.tensors, path, {"arguments": structure})

    @classmethod
    def load(cls, path: Path) -> Inputs:
        """Read what `save` wrote.

        Raises:
            ValueError: The file holds something else.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                structure = json.loads((file.metadata() or {})["arguments"])
                leaves = [
                    file.get_tensor(leaf["tensor"]) if "tensor" in leaf else leaf["value"]
                    for leaf in structure["leaves"]
                ]
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"path={str(path)!r} holds no example inputs: {error}") from None
        args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(structure["spec"]))
        return cls(tuple(args), dict(kwargs))


def output_tensors(outputs: Any) -> list[Tensor]:
    """All tensors of any engine's outputs, in order."""
    if hasattr(outputs, "to_tuple"):  # transformers' ModelOutput, in every version
        outputs = outputs.to_tuple()
    leaves = pytree.tree_leaves(outputs)
    return [torch.as_tensor(leaf) for leaf in leaves if hasattr(leaf, "shape")]


def save_tensors(tensors: Sequence[Tensor], path: Path, about: dict[str, str]) -> None:
    """Write tensors by number; those that share memory are written twice."""
    copies = {str(i): t.detach().contiguous().clone() for i, t in enumerate(tensors)}
    save_file(copies, str(path), metadata=about)


def load_tensors(path: Path) -> list[Tensor]:
    """Tensors by number.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return [file.get_tensor(str(i)) for i in range(len(file.keys()))]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path={str(path)!r} holds no tensors by number: {error}") from None
