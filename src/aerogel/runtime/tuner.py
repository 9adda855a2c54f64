"""Which candidate is fastest for each layer: measured once, then remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from aerogel.runtime.candidates import Candidate, candidates_for
from aerogel.runtime.candidates.torch_dense import NAME as TORCH
from aerogel.runtime.layer import Layer
from aerogel.runtime.native import LayerProbe
from aerogel.runtime.timing import Race, race, timed
from aerogel.runtime.tuning_cache import TuningCache

# A MobileNet has about ten distinct layers: together under twenty seconds.
SECONDS_PER_LAYER = 1.0
SECONDS_PER_MODEL = 20.0

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Tuned:
    """A layer and how long each way to compute it takes.

    Attributes:
        layer: The layer.
        candidates: By name.
        direct: Seconds of a call from torch, by candidate name; always has "torch".
        planned: Seconds inside a plan, without bringing values in and out.
    """

    layer: Layer
    candidates: dict[str, Candidate]
    direct: dict[str, float]
    planned: dict[str, float]

    @property
    def best_direct(self) -> Candidate:
        """The fastest way to call the layer from torch."""
        return self.candidates[_fastest(self.direct)]

    @property
    def best_planned(self) -> Candidate | None:
        """The fastest way inside a plan, if there is any."""
        return self.candidates[_fastest(self.planned)] if self.planned else None

    @property
    def seconds_dense(self) -> float:
        """The layer in dense torch."""
        return self.direct[TORCH]

    @property
    def seconds_sparse(self) -> float | None:
        """The fastest way that skips zeros, wherever it runs."""
        times = [
            seconds
            for table in (self.direct, self.planned)
            for name, seconds in table.items()
            if self.candidates[name].sparse
        ]
        return min(times, default=None)

    @property
    def native_pays(self) -> bool:
        """Whether some kernel inside a plan beats dense torch."""
        return bool(self.planned) and min(self.planned.values()) < self.seconds_dense


def _fastest(seconds: dict[str, float]) -> str:
    return min(seconds, key=lambda name: seconds[name])


class Tuner:
    """Measures layers within a budget.

    Args:
        threads: Threads of every candidate; None follows torch's setting at every call.
        cache: Where measurements are looked up and left.
        race: Times self-timed callables against each other; a fake one in tests.
        seconds: For all layers together; layers that come too late get the first candidates.
    """

    def __init__(
        self,
        threads: int | None,
        cache: TuningCache,
        race: Race = race,
        seconds: float = SECONDS_PER_MODEL,
    ) -> None:
        self._threads = threads
        self._cache = cache
        self._race = race
        self._left = seconds
        self.notes: list[str] = []

    def tune(self, layers: Sequence[Layer], on_progress: Progress | None = None) -> list[Tuned]:
        """Measure all layers; equal ones (shape, sparsity, epilogue) are measured once.

        Args:
            layers: In the model's order.
            on_progress: Called with (layer name, layers done, layers in all).
        """
        tuned = []
        for index, layer in enumerate(layers):
            if on_progress is not None:
                on_progress(layer.name, index, len(layers))
            tuned.append(self._tune(layer))
        self._cache.flush()
        return tuned

    def _tune(self, layer: Layer) -> Tuned:
        candidates = {each.name: each for each in candidates_for(layer, self._threads)}
        names = [f"direct/{n}" for n, c in candidates.items() if c.module is not None]
        names += [f"plan/{n}" for n, c in candidates.items() if c.emit is not None]
        key = self._cache.key(layer.signature())
        seconds = self._cache.get(key, names)
        if seconds is None:
            seconds = self._measure(layer, candidates)
            self._cache.put(key, seconds)
        return Tuned(layer, candidates, _table(seconds, "direct/"), _table(seconds, "plan/"))

    def _measure(self, layer: Layer, candidates: dict[str, Candidate]) -> dict[str, float]:
        started = perf_counter()
        x, residual = layer.example()
        contenders: dict[str, Callable[[], float]] = {}
        refused: dict[str, list[str]] = {}
        for name, candidate in candidates.items():
            try:
                if candidate.module is not None:
                    contenders[f"direct/{name}"] = _call(candidate.module(), x, residual)
                if candidate.emit is not None:
                    probe = LayerProbe(layer, candidate, self._threads)
                    contenders[f"plan/{name}"] = probe.kernel_seconds(x, residual)
            except (ValueError, NotImplementedError) as error:
                refused.setdefault(str(error), []).append(name)
        for reason, names in refused.items():
            which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            self.notes.append(f"{layer.name}: {which} not available: {reason}")
        with torch.no_grad():
            seconds = self._race(contenders, min(SECONDS_PER_LAYER, max(self._left, 0.0)))
        self._left -= perf_counter() - started
        return seconds


def _call(module: Any, x: torch.Tensor, residual: torch.Tensor | None) -> Callable[[], float]:
    return timed(lambda: module(x, residual))


def _table(seconds: dict[str, float], prefix: str) -> dict[str, float]:
    return {n.removeprefix(prefix): s for n, s in seconds.items() if n.startswith(prefix)}
