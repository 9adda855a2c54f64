"""What an arena runs: methods, sparsities and seeds, and which of them do not go together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from aerogel.compress import Recipe, load_recipe
from aerogel.pruning import METHODS, SearchMethod

UNSTRUCTURED = "unstructured"
# N:M patterns that a method of that kind is run with, by the sparsity they mean.
NM_PATTERNS = ("2:4", "1:4", "1:8", "1:16")
_CLOSE = 1e-9


@dataclass(frozen=True)
class Trial:
    """One method at one sparsity with one seed.

    Attributes:
        method: Slug.
        sparsity: Fraction of zeros of the pruned layers.
        seed: Of everything random.
        pattern: What is zero together; None where the method cannot reach this sparsity.
        reason: Why not, then.
    """

    method: str
    sparsity: float
    seed: int
    pattern: str | None
    reason: str = ""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-{100 * self.sparsity:g}-seed{self.seed}"


@dataclass(frozen=True)
class Arena:
    """What competes.

    Args:
        model: Registered name, file or folder, or `import.path:callable`.
        data: Registered name, or a folder of images.
        methods: Slugs; ("all",) is every method that trains once or not at all. Those that train
            several networks do not fit the one budget, and run only where they are named.
        sparsities: Fractions of zeros, in (0, 1).
        seeds: Repetitions.
        flags: More values of the recipe by dotted key, for example {"prune.epochs": 4}: the budget.
        recipe: Built-in recipe or YAML file to start from; None takes the model's own.

    Raises:
        ValueError: An unknown method (nearest are listed), a sparsity out of range, or nothing to
            run.
    """

    model: str
    data: str
    methods: tuple[str, ...] = ("all",)
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    seeds: tuple[int, ...] = (0,)
    flags: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None

    def __post_init__(self) -> None:
        for sparsity in self.sparsities:
            if not 0.0 < sparsity < 1.0:
                raise ValueError(f"sparsities: {sparsity} is not in (0, 1)")
        if not self.sparsities or not self.seeds:
            raise ValueError("sparsities and seeds: expected at least one each")
        self.chosen()

    def chosen(self) -> tuple[str, ...]:
        """The methods' slugs."""
        from aerogel.compress.recipe import nearest
        from aerogel.pruning.method import method_slug

        if self.methods == ("all",):
            return tuple(s for s, m in METHODS.items() if not isinstance(m, SearchMethod))
        slugs = tuple(method_slug(name) for name in self.methods)
        for slug in slugs:
            if slug not in METHODS:
                known = tuple(METHODS)
                raise ValueError(f"methods: {slug!r} is unknown; nearest: {nearest(slug, known)}")
        return slugs

    def trials(self) -> list[Trial]:
        """All of them, those that cannot run included, with the reason."""
        found = []
        for method in self.chosen():
            for sparsity in self.sparsities:
                pattern = pattern_for(method, sparsity)
                reason = "" if pattern else f"{method} has no pattern of {sparsity:.0%} zeros"
                found += [Trial(method, sparsity, seed, pattern, reason) for seed in self.seeds]
        return found

    def dense_recipe(self, seed: int) -> Recipe:
        """Of the run that trains the dense network of a seed."""
        return load_recipe(self.recipe, {**self._flags(seed), "method": "gradual-pruning"})

    def recipe_of(self, trial: Trial, dense: str) -> Recipe:
        """Of a trial that starts from the file `dense`."""
        flags = {
            **self._flags(trial.seed),
            "method": trial.method,
            "sparsity": trial.sparsity,
            "pattern": trial.pattern,
            "model.weights": dense,
            "dense.epochs": 0,
        }
        if METHODS[trial.method].from_scratch:
            base = self.dense_recipe(trial.seed)
            flags["prune.epochs"] = base.dense.epochs + base.prune.epochs
        return load_recipe(self.recipe, flags)

    def _flags(self, seed: int) -> dict[str, Any]:
        measure = {
            "measure.engines": ["torch eager"],
            "measure.batches": [1],
            "measure.threads": [1],
            "measure.clock": "cpu",
            "measure.isolate": False,
        }
        names = {"model.name": self.model, "data.name": self.data, "seed": seed}
        return {**measure, **names, **self.flags}


def pattern_for(method: str, sparsity: float) -> str | None:
    """The pattern by which a method reaches a sparsity, or None."""
    found = METHODS[method]
    if found.prunes_by(UNSTRUCTURED):
        return UNSTRUCTURED
    if not found.prunes_by("2:4"):
        return found.pattern
    for pattern in NM_PATTERNS:
        kept, group = (int(part) for part in pattern.split(":"))
        if math.isclose(1 - kept / group, sparsity, abs_tol=_CLOSE):
            return pattern
    return None
