"""What a pruning method is to those who run any of them: recipes, the arena, trainers.

Each system's file ends with its `METHOD`, and `aerogel.pruning.METHODS` lists them by slug. There
are four kinds, by what a method is given:

| kind | is given | for example |
| --- | --- | --- |
| `TrainingMethod` | a model and its optimizer; steps in the optimizer's place | gradual pruning |
| `RewritingMethod` | a fresh model; puts another in its place, then trains that | Sparse-IFT |
| `OneShotMethod` | a trained model and a few batches | Wanda |
| `SearchMethod` | the means to train networks, as often as it wants | lottery tickets |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from aerogel.arguments import check_count, check_number
from aerogel.sparsity.blocks import to_device
from aerogel.sparsity.masks import MaskSet


@dataclass(frozen=True)
class Goal:
    """What a method is to reach within one training phase.

    Attributes:
        parameters: Names of the weights to prune; none for a method that makes no zeros.
        sparsity: Fraction of zeros at the end, in [0, 1).
        pattern: Which weights become zero together.
        steps: Optimizer steps of the phase.
        begin, end: Where the zeros begin to come and where they are all there, as fractions of it.
        initial_sparsity: Fraction of zeros at `begin`.
        updates: How many times the mask is computed anew between them.
        power: Exponent of the ramp.
        seed: Of the method's random choices.
    """

    parameters: tuple[str, ...]
    sparsity: float
    pattern: str
    steps: int
    begin: float = 0.0
    end: float = 0.6
    initial_sparsity: float = 0.0
    updates: int = 40
    power: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("sparsity", self.sparsity, "[0, 1)")
        check_number("initial_sparsity", self.initial_sparsity, "[0, 1)")
        check_number("begin", self.begin, "[0, 1]")
        check_number("end", self.end, "[0, 1]")
        check_number("power", self.power, "(0, inf)")
        check_count("steps", self.steps)
        check_count("updates", self.updates)

    @property
    def generator(self) -> torch.Generator:
        """A fresh source of randomness, seeded."""
        return torch.Generator().manual_seed(self.seed)

    def window(self) -> tuple[int, int, int]:
        """First and last step of the ramp, and the steps from one new mask to the next."""
        begin = min(round(self.begin * self.steps), self.steps - 1)
        end = max(round(self.end * self.steps) - 1, begin + 1)
        return begin, end, max(1, (end - begin) // self.updates)


class Pruner(Protocol):
    """What trains in the optimizer's place."""

    def step(self) -> object:
        """One optimizer step, and what comes with it."""

    def finalize(self) -> object:
        """Bake the zeros into the weights and leave a plain model."""

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a kill: nested dicts of tensors and plain numbers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume."""


class Trainings(Protocol):
    """The means to train networks, for methods that need several trainings.

    Attributes:
        folder: Where a method keeps what has to survive a kill.
    """

    folder: Path

    def fresh(self, seed: int) -> nn.Module:
        """The network with initial weights of this seed."""

    def trained(self) -> nn.Module:
        """The trained dense network."""

    def train(self, model: nn.Module, masks: MaskSet | None, name: str, seed: int) -> float:
        """Train a network in place for the whole phase, with fixed masks.

        Args:
            model: The network.
            masks: `True` = kept; all other weights are and stay zero. None trains it dense.
            name: Of this training among the method's; one that was stopped goes on by it.
            seed: Of the order of the data.

        Returns:
            Its accuracy on held-out data (or what stands for it; higher is better).
        """

    def score(self, model: nn.Module) -> float:
        """The same accuracy, without training."""

    def inputs(self) -> Iterable[Any]:
        """Batches of training inputs, for statistics."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What all kinds have in common.

    Attributes:
        slug: Its name in recipes and in the manifest.
        patterns: Kinds of pattern it prunes by ("n:m", or what stands before the first colon); all
            if empty.
        pattern: What it takes where the recipe chooses none.
        proposes: Names of the weights to prune where neither the recipe nor the model says.
        unfit: Why it cannot be used for a network, or None.
        prepare: Changes the network, and the dense one it learns from alike, before it is pruned.
    """

    slug: str
    patterns: tuple[str, ...] = ()
    pattern: str | None = None
    proposes: Callable[[nn.Module], tuple[str, ...]] = lambda model: ()
    unfit: Callable[[nn.Module], str | None] = lambda model: None
    prepare: Callable[[nn.Module, nn.Module, Any, Goal], None] | None = None

    @property
    def one_shot(self) -> bool:
        """Whether it needs no training."""
        return False

    @property
    def from_scratch(self) -> bool:
        """Whether it starts from initial weights rather than from a trained network."""
        return False

    def prunes_by(self, pattern: str) -> bool:
        """Whether a pattern, as a string, is one of its kinds."""
        kind = pattern.strip().lower().partition(":")[0]
        return not self.patterns or ("n:m" if kind.isdigit() else kind) in self.patterns


@dataclass(frozen=True, kw_only=True)
class TrainingMethod(Method):
    """A method that steps in the optimizer's place.

    Attributes:
        build: Makes the pruner of one phase from the model and its optimizer.
        starts: From a trained network, or from a "fresh" one with initial weights.
    """

    build: Callable[[nn.Module, torch.optim.Optimizer, Goal], Pruner]
    starts: Literal["trained", "fresh"] = "trained"

    @property
    def from_scratch(self) -> bool:
        """Whether it starts from initial weights rather than from a trained network."""
        return self.starts == "fresh"


@dataclass(frozen=True, kw_only=True)
class RewritingMethod(TrainingMethod):
    """A method that trains another network in the given one's place, from initial weights.

    Attributes:
        rewrite: The other network, its new layers with initial weights: of a model, which stays as
            it is, the names of the weights whose layers are replaced (those that the method cannot
            replace stay), and the sparsity in [0, 1). It must depend on nothing else but torch's
            random numbers, so that a saved network can be built again.
        masked: Names of the other network's weights that training makes sparse.
        saves: What the sparsity is a fraction of, in words.
    """

    rewrite: Callable[[nn.Module, Sequence[str], float], nn.Module]
    masked: Callable[[nn.Module], tuple[str, ...]] = lambda model: ()
    saves: str = "zeros"
    starts: Literal["trained", "fresh"] = "fresh"


class Unpruned:
    """The `Pruner` of a method that makes no zeros: the optimizer's own steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def step(self) -> object:
        """One optimizer step."""
        return self._optimizer.step()

    def finalize(self) -> None:
        """Nothing is left to do."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the optimizer keeps its own state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to resume."""


@dataclass(frozen=True, kw_only=True)
class OneShotMethod(Method):
    """A method that needs no training.

    Attributes:
        prune: Prunes a trained model in place, given batches of inputs (as `call_with_inputs` takes
            them) and a callback for progress, `(layers done, layers in all, name)`.
        needs_data: Whether it looks at the batches.
    """

    prune: Callable[[nn.Module, Iterable[Any], Goal, Callable[[int, int, str], None]], MaskSet]
    needs_data: bool = True

    @property
    def one_shot(self) -> bool:
        """Whether it needs no training."""
        return True


@dataclass(frozen=True, kw_only=True)
class SearchMethod(Method):
    """A method that trains several networks.

    Attributes:
        search: Returns the sparse network it found.
    """

    search: Callable[[Trainings, Goal], nn.Module]


def call_with_inputs(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Any:
    """How a method runs the batches it is given: `model(*inputs)`, or `model(**inputs)`."""
    place = next((p.device for p in model.parameters()), None)
    if isinstance(inputs, Mapping):
        return model(**{name: to_device(value, place) for name, value in inputs.items()})
    return model(*(to_device(value, place) for value in inputs))


def method_slug(method: str) -> str:
    """A method's slug from the ways people write it."""
    return method.strip().lower().replace("_", "-")


METHODS: dict[str, Method] = {}
"""Every pruning method by its slug, as `aerogel compress --method` and the arena take it.

The room's `__init__` fills it. It stands here, below the systems, for `callbacks`, which systems
import and which looks methods up.
"""
