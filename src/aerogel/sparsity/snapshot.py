"""A model's state at one step, held under plain names and kept in one safetensors file.

Plain names are those without parametrizations, so that a `Snapshot` survives their being added or
removed. `aerogel.sparsity.rewind` goes back to it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from aerogel.arguments import check_count

_FORMAT = "aerogel.snapshot.1"
_TENSOR = "$tensor"  # JSON stands in for a tensor of the optimizer state by {_TENSOR: key}


@dataclass(frozen=True)
class Snapshot:
    """A model's (and optimizer's) state at one step.

    Attributes:
        params: plain parameter name -> value; tied parameters appear once.
        buffers: plain buffer name -> value, batch-norm statistics included.
        step: optimizer steps done when it was taken.
        optimizer: the optimizer's `state_dict`, or None.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    step: int = 0
    optimizer: dict[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def capture(
        cls, model: nn.Module, optimizer: Optimizer | None = None, step: int = 0
    ) -> Snapshot:
        """Copy the state of `model` (and `optimizer`) as it is now.

        Args:
            model: any module.
            optimizer: also keep its state, for `rewind(..., what=("params", "buffers",
                "optimizer"))`.
            step: optimizer steps done, >= 0.

        Raises:
            ValueError: step < 0, or a parameter on the meta device.
        """
        check_count("step", step, 0)
        params, buffers = plain_params(model), plain_buffers(model)
        for name, tensor in (params | buffers).items():
            if tensor.is_meta:
                raise ValueError(f"{name} is on the meta device; there is nothing to capture")
        state = None if optimizer is None else copied(optimizer.state_dict())
        return cls(_cloned(params), _cloned(buffers), step, state)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; readable without executing code.

        Raises:
            TypeError: the optimizer state holds something JSON cannot express.
        """
        tensors = {f"params/{n}": t for n, t in self.params.items()}
        tensors |= {f"buffers/{n}": t for n, t in self.buffers.items()}
        tree = None if self.optimizer is None else _flatten(self.optimizer, "optimizer", tensors)
        header = {"format": _FORMAT, "step": str(self.step), "optimizer": json.dumps(tree)}
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        target = Path(path)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        try:
            save_file(whole, temporary, metadata=header)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a snapshot, or a damaged one.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a snapshot or is damaged: {error}") from None
        if header.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a snapshot: format {header.get('format')!r}")
        try:
            tree = _unflatten(json.loads(header["optimizer"]), tensors)
            step = int(header["step"])
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is a damaged snapshot: {error!r}") from None
        parts: dict[str, dict[str, Tensor]] = {"params": {}, "buffers": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            if part in parts:
                parts[part][name] = tensor
        return cls(parts["params"], parts["buffers"], step, tree)


def _plain(name: str) -> str:
    """A parameter's name as it would be without parametrizations."""
    if "parametrizations." in name and name.endswith(".original"):
        return name.removesuffix(".original").replace("parametrizations.", "")
    return name


def plain_params(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by plain name, detached; tied ones appear once."""
    return {_plain(name): p.detach() for name, p in model.named_parameters()}


def plain_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers by name, those of parametrizations left out."""
    # Buffers inside a parametrization (a mask) belong to the coupling, not to the model.
    return {n: b for n, b in model.named_buffers() if "parametrizations." not in n}


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def copied(value: Any) -> Any:
    """Deep copy of a nest of dicts, lists and tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v) for v in value)
    return value


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; tensors move into `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, dict):
        # Optimizer state is keyed by integers, which JSON would turn into strings: keep pairs.
        return {"$pairs": [[k, _flatten(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{path}: {type(value).__name__} cannot be saved")


def _unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _unflatten(v, tensors) for key, v in value["$pairs"]}
    if isinstance(value, list):
        return [_unflatten(v, tensors) for v in value]
    return value
