"""Weights from files: safetensors, or torch files read with `weights_only=True`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Where training programs put the weights among other things: torchvision's kin, and BasicSR.
_PARTS = ("state_dict", "params_ema", "params")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict without executing anything that is in the file.

    Args:
        path: `.safetensors` (plain, or written by `aerogel.save`), `.pth` or `.pt`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not hold a state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint_path: no file {str(path)!r}")
    if path.suffix == ".safetensors":
        from aerogel.runtime.checkpoint import load

        return dict(load(path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a file of weights: {error}") from error
    for part in _PARTS:
        if isinstance(state, dict) and isinstance(state.get(part), dict):
            state = state[part]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} does not hold a state dict (names and tensors)")
    return state


def load_weights(
    build: Callable[..., nn.Module], kwargs: dict[str, Any], state: dict[str, Tensor], path: Path
) -> nn.Module:
    """Build a model with the checkpoint's classifier and input size, load it, then adapt both."""
    wanted = build(**kwargs)
    convert = getattr(wanted, "convert_state_dict", None)
    state = state if convert is None else convert(state)
    classes = getattr(wanted, "num_classes", None)
    head = getattr(wanted, "classifier_name", None)
    saved = state.get(f"{head}.weight") if head else None
    if saved is None or classes is None or saved.shape[0] == classes:
        _load_strict(wanted, state, path)
        return wanted
    model = build(**{**kwargs, "num_classes": saved.shape[0]})
    _load_strict(model, state, path)
    model.reset_classifier(classes)  # type: ignore[operator]
    return model


def _load_strict(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    state = {name: _adapt_stem(value, own.get(name)) for name, value in state.items()}
    bad = [f"{name} (missing)" for name in own.keys() - state.keys()]
    bad += [f"{name} (unknown)" for name in state.keys() - own.keys()]
    bad += [
        f"{name} ({tuple(state[name].shape)}, expected {tuple(own[name].shape)})"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if bad:
        raise ValueError(
            f"{path} holds the weights of another model than {type(model).__name__}: "
            f"{len(bad)} names or shapes differ, the first are {', '.join(sorted(bad)[:3])}"
        )
    model.load_state_dict(state)


def _adapt_stem(value: Tensor, own: Tensor | None) -> Tensor:
    """Colour filters for grey images: a grey image is one whose three channels are equal."""
    if own is None or value.dim() != 4 or value.shape[1] != 3 or own.shape[1:2] != (1,):
        return value
    return value.sum(dim=1, keepdim=True)
