"""The native kernels of attention, where they are built."""

from __future__ import annotations

import importlib
from types import ModuleType


def _find(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"aerogel.kernels.{name}")
    except ImportError:
        return None


kernels = _find("attention")
lowering = _find("attention_lower")


def kernels_available() -> bool:
    """Whether the tile kernels exist; without them `attend` takes its reference."""
    return kernels is not None
