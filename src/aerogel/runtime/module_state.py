"""A module as a dict of dense tensors, and back, whatever parametrizations it wears."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


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


@torch.no_grad()
def dense_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's state under its dense names with parametrizations baked, and the masks."""
    state: dict[str, Any] = {}
    masks: dict[str, Tensor] = {}
    baked: dict[tuple[int, str], Tensor] = {}
    owners = {
        f"{prefix}parametrizations.{name}.": (prefix, module, name)
        for prefix, module, name in _parametrized(model)
    }
    for key, value in model.state_dict().items():
        owner = next((o for stem, o in owners.items() if key.startswith(stem)), None)
        if owner is None:
            state[key] = value
            continue
        prefix, module, name = owner
        if f"{prefix}{name}" in state:
            continue
        tensor = baked.setdefault((id(module), name), getattr(module, name))
        state[f"{prefix}{name}"] = tensor
        for mask in _masks_of(module, name, tensor.shape):
            known = masks.get(f"{prefix}{name}")
            masks[f"{prefix}{name}"] = mask if known is None else mask & known
    return state, masks


def fill(
    model: nn.Module, state: dict[str, Tensor], masks: dict[str, np.ndarray], strict: bool
) -> None:
    """Copy dense tensors into a model, through its parametrizations where it has any."""
    expected = dense_state(model)[0]
    missing = sorted(expected.keys() - state.keys())
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
