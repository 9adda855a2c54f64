"""What a candidate is, and who provides them for which operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from aerogel.runtime.layer import Layer


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to compute a layer.

    Attributes:
        name: Names the kernel and its variant, unique within the layer; keys the tuning cache.
        sparse: Whether it skips the zeros.
        module: Builds a module whose forward(x, residual=None) is the whole layer, for calls
            from torch; None if it only exists inside plans.
        emit: Appends the layer to a `kernels.PlanBuilder`: emit(builder, x, residual) -> value;
            None if it only exists outside plans.
        pattern: (n, m) where it stores n values for every m inputs, whether they are zeros or not.
    """

    name: str
    sparse: bool
    module: Callable[[], nn.Module] | None = None
    emit: Callable[[Any, Any, Any], Any] | None = None
    pattern: tuple[int, int] | None = None


# (layer, threads or None for torch's setting at the time of the call) -> candidates
Provider = Callable[[Layer, int | None], Iterable[Candidate]]

_PROVIDERS: dict[str, list[Provider]] = {}


def provides(*ops: str) -> Callable[[Provider], Provider]:
    """Register a provider for layers of these ops ("conv2d", "linear")."""

    def register(provider: Provider) -> Provider:
        for op in ops:
            _PROVIDERS.setdefault(op, []).append(provider)
        return provider

    return register


def candidates_for(layer: Layer, threads: int | None) -> list[Candidate]:
    """All candidates for a layer, by every provider of its op."""
    return [
        candidate
        for provider in _PROVIDERS.get(layer.op, [])
        for candidate in provider(layer, threads)
    ]
