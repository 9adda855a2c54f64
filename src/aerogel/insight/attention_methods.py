"""Ways to attend, as commands and studies name them, and models that attend so for a while."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from aerogel.attention import SELECTORS, attach, detach, load_selector, make_selector
from aerogel.attention.calibration import check_options

DENSE = "dense"


@dataclass(frozen=True)
class Method:
    """A way to attend.

    Attributes:
        name: "dense" for the model's own attention, a selector's name, or a selector file.
        options: of the named selector.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What tables call it."""
        return ":".join([Path(self.name).stem, *(f"{k}={v}" for k, v in self.options.items())])

    def identity(self) -> dict[str, Any]:
        """What decides its results, as JSON can hold it; a file counts by its content."""
        identity: dict[str, Any] = {"label": self.label, "name": self.name}
        if self.name != DENSE and self.name not in SELECTORS:
            identity["file"] = hashlib.sha256(Path(self.name).read_bytes()).hexdigest()
        return identity

    @classmethod
    def parse(cls, text: str) -> Method:
        """``NAME`` or ``NAME:option=value:option=value``; values as JSON, or else text.

        Raises:
            ValueError: no selector or file has this name, or an option has no value.
        """
        name, *pairs = text.split(":")
        if name != DENSE and name not in SELECTORS and not Path(name).is_file():
            known = ", ".join([DENSE, *sorted(SELECTORS)])
            raise ValueError(f"method {name!r}: expected {known}, or a selector file")
        options = parse_options(pairs)
        if name in SELECTORS:
            check_options(name, options)
        elif options:
            raise ValueError(f"method {text!r}: only named selectors take options")
        return cls(name, options)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Options from ``name=value`` texts; values are JSON where they can be, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"option {pair!r}: expected name=value")
        try:
            options[key.strip().replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            options[key.strip().replace("-", "_")] = value
    return options


@contextlib.contextmanager
def attending(model: nn.Module, method: Method) -> Iterator[Any]:
    """A method at work in a model while the context is open; yields its selector, or None."""
    if method.name == DENSE:
        yield None
        return
    if method.name in SELECTORS:
        selector = make_selector(method.name, **method.options)
    else:
        selector = load_selector(method.name, model)
    attach(model, selector)
    try:
        yield selector
    finally:
        detach(model)


def empty_cache(model: Any) -> Any:
    """An empty KV cache as the model's selector wants it."""
    from aerogel.attention.cache import AerogelCache
    from aerogel.attention.hf import attached_layers

    return AerogelCache(model) if attached_layers(model) else None
