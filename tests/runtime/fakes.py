"""Timers that say what the test wants, so that no test depends on how busy the machine is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from aerogel.runtime.capture import frozen_copy
from aerogel.runtime.compiled import CompiledModule
from aerogel.runtime.compiler import Settings, build
from aerogel.runtime.timing import Measure


def clock(*favourites: str) -> Measure:
    """Contenders whose name contains a favourite take 1 s, all others 2 s."""

    def measure(contenders: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
        return {n: 1.0 if any(word in n for word in favourites) else 2.0 for n in contenders}

    return measure


def build_with(
    model: nn.Module,
    *args: Any,
    strategy: str = "fastest",
    whole: str = "native plans",
    layer: str | tuple[str, ...] = "spmm",
    tolerance: float = 1e-4,
    threads: int = 1,
    **kwargs: Any,
) -> CompiledModule:
    """Compile with fake timers: `layer` names the fastest candidates, `whole` the fastest model."""
    settings = Settings(
        threads=threads,
        tolerance=tolerance,
        strategy=strategy,
        measure=clock(whole),
        race=clock(*((layer,) if isinstance(layer, str) else layer)),
    )
    return build(frozen_copy(model), args, kwargs, settings)
