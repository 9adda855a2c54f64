"""Models by name: `create_model("mobilenet_v2", num_classes=10)`, in timm's words."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from aerogel.models.checkpoint import load_weights, read_state_dict

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., nn.Module]
    config: dict[str, Any] = field(default_factory=dict)


_REGISTRY: dict[str, _Entry] = {}


def register_model(**config: Any) -> Callable[[Builder], Builder]:
    """Decorator: register a builder under its own name, with facts about the model.

    Args:
        **config: `input_size` (one sample's shape), `num_classes`, `params` (exact count),
            `macs`, `paper`, `license`, ...; returned by `model_config`.
    """

    def register(build: Builder) -> Builder:
        if build.__name__ in _REGISTRY:
            raise ValueError(f"model {build.__name__!r} is registered already")
        _REGISTRY[build.__name__] = _Entry(build, config)
        return build

    return register


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models that match a shell pattern, sorted."""
    return sorted(fnmatch.filter(_REGISTRY, pattern))


def model_config(name: str) -> dict[str, Any]:
    """Facts about a model: input size, number of classes, parameter count, paper, licence."""
    return dict(_entry(name).config)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | None = None,
    checkpoint_path: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model, optionally with weights from a file.

    Args:
        name: a name of `list_models()`.
        num_classes: outputs of the classifier; 0 leaves it out. Default: the model's own.
        in_chans: input channels. Default: the model's own.
        img_size: height and width of the images. Default: the model's own.
        checkpoint_path: `.safetensors`, `.pth` or `.pt` file (nothing is ever unpickled), or the
            folder of a text encoder. A classifier of another size than `num_classes` is replaced
            by a new one after loading.
        **kwargs: further arguments of the model.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: unknown name (the nearest are listed), or a checkpoint of another model.
        FileNotFoundError: no file at `checkpoint_path`.
    """
    build = _entry(name).build
    given = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    kwargs.update({key: value for key, value in given.items() if value is not None})
    if checkpoint_path is None:
        return build(**kwargs)
    path = Path(checkpoint_path)
    if path.is_dir():
        return build(folder=path, **kwargs)
    state = read_state_dict(path)
    return load_weights(build, kwargs, state, path)


def _entry(name: str) -> _Entry:
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=5, cutoff=0.3) or list_models()[:5]
        raise ValueError(f"unknown model {name!r}; nearest names: {', '.join(near)}")
    return _REGISTRY[name]
