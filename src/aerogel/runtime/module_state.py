"""A module as a dict of dense tensors, and back, whatever parametrizations it wears.

Layers that store only what is not zero count as the plain ones they stand for. Such is any module
with `mask`, `set_mask(mask)` and `to_dense()`, which gives the plain layer, that also loads the
plain layer's state dict: `aerogel.train.SparseLayer` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the very same memory, seen the same way."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _stores_sparse(module: nn.Module) -> bool:
    # Asked of the class: `mask` is made anew on each access.
    return all(hasattr(type(module), name) for name in ("mask", "set_mask", "to_dense"))


def plain_layers(model: nn.Module) -> nn.Module:
    """Put plain layers in the place of those that store only what is not zero.

    Returns:
        The model; another object only if the model itself is one layer.
    """
    plain: dict[int, Any] = {
        id(m): m.to_dense()  # type: ignore[operator]
        for m in model.modules()
        if _stores_sparse(m)
    }
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in plain:
                parent._modules[name] = plain[id(child)]
    result: nn.Module = plain.get(id(model), model)
    return result


def _is_mask(buffer: Tensor | None, shape: torch.Size) -> bool:
    return isinstance(buffer, Tensor) and buffer.dtype == torch.bool and buffer.shape == shape


def _parametrized(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(prefix, module, tensor name) of every parametrized tensor, shared modules by each name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                yield f"{prefix}." if prefix else "", module, name


def _masks_of(module: nn.Module, name: str, shape: torch.Size) -> list[Tensor]:
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    return [b for p in chain for b in p.buffers() if _is_mask(b, shape)]


def _originals(module: nn.Module, name: str) -> tuple[int, ...]:
    """Identifies what a parametrized tensor is made of; equal for tied tensors."""
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    sources = [*chain.parameters(recurse=False), *chain.buffers(recurse=False)]
    return (*map(id, sources), *map(id, chain))


@torch.no_grad()
def dense_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's state under its dense names with parametrizations baked, and the masks."""
    state: dict[str, Any] = {}
    masks: dict[str, Tensor] = {}
    baked: dict[tuple[int, ...], Tensor] = {}
    owners = {
        f"{prefix}parametrizations.{name}.": (prefix, module, name)
        for prefix, module, name in _parametrized(model)
    }
    sparse = _sparse_layers(model)
    plain = {id(module): module.to_dense() for module in sparse.values()}
    for key, value in model.state_dict().items():
        stem = key.rpartition(".")[0]
        if stem in sparse:
            layer = sparse[stem]
            state.update(plain[id(layer)].state_dict(prefix=f"{stem}." if stem else ""))
            masks[f"{stem}.weight" if stem else "weight"] = layer.mask
            continue
        owner = next((owners[stem] for stem in _stems(key) if stem in owners), None)
        if owner is None:
            state[key] = value
            continue
        prefix, module, name = owner
        dense = f"{prefix}{name}"
        if dense in state:
            continue
        state[dense] = tensor = baked.setdefault(_originals(module, name), getattr(module, name))
        for mask in _masks_of(module, name, tensor.shape):
            masks[dense] = masks[dense] & mask if dense in masks else mask
    return state, masks


def _sparse_layers(model: nn.Module) -> dict[str, Any]:
    """Layers that store only what is not zero, shared ones by each name."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if _stores_sparse(module)}


def _stems(key: str) -> Iterator[str]:
    """The places in a state dict's key where a parametrized tensor's name may end."""
    parts = key.split(".")
    for end in range(2, len(parts)):
        if parts[end - 2] == "parametrizations":
            yield ".".join(parts[:end]) + "."


@torch.no_grad()
def bake_parametrizations(model: nn.Module) -> nn.Module:
    """Replace every parametrized tensor by its present value, in place; ties stay ties.

    `torch.nn.utils.parametrize.remove_parametrizations` edits the module's class, which deep
    copies share: used on a copy it breaks the original. This gives the module its old class back.

    Returns:
        The model.
    """
    found = [(module, name) for _, module, name in _parametrized(model)]
    values: dict[tuple[int, ...], nn.Parameter] = {}
    fresh = {}
    for module, name in found:
        key = _originals(module, name)
        if key not in values:
            values[key] = nn.Parameter(getattr(module, name).detach().clone(), requires_grad=False)
        fresh[id(module), name] = values[key]
    for module, name in found:
        if "parametrizations" in module._modules:
            del module._modules["parametrizations"]
            module.__class__ = type(module).__bases__[0]
        if name not in module._parameters:
            module.register_parameter(name, fresh[id(module), name])
    return model


def fill(
    model: nn.Module, state: dict[str, Tensor], masks: dict[str, np.ndarray], strict: bool
) -> None:
    """Copy dense tensors into a model, through its parametrizations where it has any."""
    expected = dense_state(model)[0]
    given = {memory_of(value) for name, value in expected.items() if name in state}
    # Other programs leave out all but one of the tensors that share their memory.
    missing = sorted(
        name
        for name, value in expected.items()
        if name not in state and not (value.numel() and memory_of(value) in given)
    )
    extra = sorted(state.keys() - expected.keys())
    if strict and (missing or extra):
        close = {n: get_close_matches(n, list(expected), 1) for n in extra[:3]}
        hints = ", ".join(f"{n!r} (nearest: {c[0]!r})" if c else repr(n) for n, c in close.items())
        raise ValueError(
            f"the checkpoint does not fit the model: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} unexpected [{hints}]; strict=False loads what fits"
        )
    for name in expected.keys() & state.keys():
        if expected[name].shape != state[name].shape:
            raise ValueError(
                f"the checkpoint's {name!r} has shape {tuple(state[name].shape)}, "
                f"the model's has {tuple(expected[name].shape)}"
            )
    plain = {name: value for name, value in state.items() if name in expected}
    for prefix, layer in _sparse_layers(model).items():
        name = f"{prefix}.weight" if prefix else "weight"
        if name in plain:
            kept = masks.get(name)
            layer.set_mask(plain[name] != 0 if kept is None else torch.from_numpy(kept))
    for prefix, module, name in list(_parametrized(model)):
        if f"{prefix}{name}" in plain:
            value = plain.pop(f"{prefix}{name}")
            kept = masks.get(f"{prefix}{name}")
            mask = value != 0 if kept is None else torch.from_numpy(kept)
            _fill_parametrized(module, name, value, mask)
    model.load_state_dict(plain, strict=False)


@torch.no_grad()
def _fill_parametrized(module: nn.Module, name: str, value: Tensor, mask: Tensor) -> None:
    buffers = _masks_of(module, name, value.shape)
    for buffer in buffers:
        buffer.copy_(mask)
    chain: Any = module.parametrizations[name]  # type: ignore[index]
    if len(buffers) >= len(chain):
        chain.original.copy_(value)
        return
    try:
        setattr(module, name, value.to(getattr(module, name)))
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"cannot load into {name!r}: its parametrization {type(chain[0]).__name__} has no "
            "right_inverse; remove it with torch.nn.utils.parametrize.remove_parametrizations"
        ) from error
