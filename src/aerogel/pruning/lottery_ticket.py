"""Lottery tickets: the small network that would have sufficed, with the start that makes it train.

Paper: Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural
Networks", 2018, arXiv 1803.03635.

The idea: train a network, prune a share of its smallest weights, put the survivors back to their
initial values, and train again; repeat. What is left after some rounds, mask and initial values
together (a "winning ticket"), trains alone to the accuracy of the whole network. With other initial
values, or with the zeros elsewhere, it does not.

When to use it: to study which sparse networks can be trained, or as the strongest and dearest
baseline for methods that prune once. For large networks and learning rates reset not to the start
but to a step soon after it (`rewind_to`, 0.1 % to 7 % of the training; Frankle et al., arXiv
1912.05671), or warm the learning rate up.

Costs and buys: ``rounds + 1`` whole trainings. It buys an unstructured sparse network that may be
retrained from its start, often in fewer steps. The zeros become time only in a runtime that skips
them (`aerogel.compile`), and only where few weights are left.

The claim this repository measures (``aerogel reproduce lottery-ticket``): with 4.9 % of its weights
a winning ticket reaches the accuracy of the dense network, while the same mask with new initial
values, and the same initial values under a shuffled mask, stay points below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.arguments import check_choice, check_count, check_number
from aerogel.pruning.method import Goal, SearchMethod, Trainings
from aerogel.pruning.rounds import RoundFiles, RoundResult, SavedRound, State, same_state
from aerogel.sparsity.masks import MaskSet, build_masks
from aerogel.sparsity.rewind import Snapshot, reinitialize, rewind, shuffle_masks
from aerogel.sparsity.schedules import Geometric
from aerogel.sparsity.scores import compute_scores
from aerogel.sparsity.select import ParamSelection, select_parameters
from aerogel.sparsity.topk import pruned_count

Reset = Literal["every_round", "at_end"]

_SCOPES = ("layer", "global")
_RESETS = ("every_round", "at_end")


@dataclass(frozen=True)
class TrainOutcome:
    """What a training function gives back.

    Attributes:
        steps: optimizer steps of a whole training, the same in every round.
        metrics: anything measured; kept with the round.
        snapshot: the model's state after ``snapshot_at`` steps, if that was asked for.
    """

    steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    snapshot: Snapshot | None = None


TrainFn = Callable[[nn.Module, MaskSet, int, int | None], TrainOutcome]
"""``train_fn(model, masks, start_step, snapshot_at)``: train a model in place, masks held.

From ``start_step`` (0, or where rewinding goes) to the fixed end, with a fresh optimizer and the
same data order each time; `aerogel.sparsity.StaticSparseTrainer` holds the masks. Where
``snapshot_at`` is not None, the outcome has the `Snapshot` taken after that many steps.
"""


@dataclass(frozen=True)
class LotteryResult:
    """All rounds, densest first."""

    rounds: list[RoundResult]


class LotteryTicket:
    """Iterative magnitude pruning with rewinding.

    Args:
        model_fn: makes the network with its initial weights, a function of torch's global random
            state alone (it is seeded before each call).
        train_fn: trains it, see `TrainFn`.
        rounds: prunings, each followed by a training; 1 with ``rate`` = the wanted sparsity is the
            paper's one-shot variant.
        rate: share of the alive weights pruned per round, in (0, 1): one for all layers, or by
            glob of weight or module names (``{"features.*": 0.1, "*": 0.2}``, the first that
            matches counts).
        output_rate: of the model's last linear layer; half of its ``rate`` by default. With scope
            "global" there is none: leave the layer out with ``exclude``, as the paper does.
        scope: "layer" prunes every layer by its rate, "global" ranks all weights together.
        rewind_to: optimizer step to whose weights a ticket is reset; 0 is the initial ones.
        reset: "every_round", or "at_end" (the paper's second strategy: go on training the pruned
            network as it is, and reset only before the last round).
        exclude: globs of weights that stay dense.
        generator: seeds ``model_fn``; seeded 0 by default.
        run_dir: folder to save every round in; a run that was killed goes on at the unfinished
            round, and one with more ``rounds`` than before continues it. None keeps nothing.

    Raises:
        ValueError: an argument out of range, a layer without a rate, ``model_fn`` that makes other
            weights from the same seed, nothing left to prune, or a ``run_dir`` of another run.

    Reference:
        arXiv 1803.03635, sections 1 and 2; appendix B for the two strategies.
    """

    def __init__(
        self,
        model_fn: Callable[[], nn.Module],
        train_fn: TrainFn,
        *,
        rounds: int,
        rate: float | Mapping[str, float] = 0.2,
        output_rate: float | None = None,
        scope: Literal["layer", "global"] = "layer",
        rewind_to: int = 0,
        reset: Reset = "every_round",
        exclude: Sequence[str] = (),
        generator: torch.Generator | None = None,
        run_dir: str | Path | None = None,
    ) -> None:
        _check_plan(rounds, scope, rewind_to, reset, rate, output_rate)
        source = generator or torch.Generator().manual_seed(0)
        self._model_fn, self._train_fn = model_fn, train_fn
        self._seed = int(torch.randint(2**62, (), generator=source))
        self.rounds, self.scope, self.rewind_to, self.reset = rounds, scope, rewind_to, reset
        self.exclude = tuple(exclude)
        model = self._build(self._seed)
        self._initial = Snapshot.capture(model)
        self._check_repeatable()
        selection = self._select(model)
        self.rates = _rates_of(model, selection, rate, output_rate, scope)
        self._rewound = self._initial if rewind_to == 0 else None
        self._done: list[RoundResult] = []
        self._masks = [MaskSet.ones(selection)]  # of each round, one ahead of what is done
        self._files: RoundFiles | None = None
        if run_dir is not None:
            self._files = RoundFiles(Path(run_dir), self._settings(), self._initial)
            self._restore(self._files, selection)

    # ------------------------------------------------------------------------------- the search

    def run(self) -> LotteryResult:
        """Train, prune and reset, until ``rounds`` prunings are done and trained.

        Returns:
            The rounds, round 0 (dense) first.

        Raises:
            ValueError: the training function moved a pruned weight, trained for another number of
                steps than before, or did not capture the state at ``rewind_to``.
        """
        for number in range(len(self._done), self.rounds + 1):
            self._train_round(number)
        return LotteryResult(list(self._done[: self.rounds + 1]))

    def _train_round(self, number: int) -> None:
        masks = self._masks[number]
        model = self._build(self._seed)
        start = self._load_start(model, number)
        masks.apply_(model)
        wanted = self.rewind_to if number == 0 and self.rewind_to else None
        outcome = self._train_fn(model, masks.clone(), start, wanted)
        self._check_outcome(model, masks, outcome, wanted)
        if wanted is not None:
            self._rewound = outcome.snapshot
        final = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        result = RoundResult(
            number, masks.density(), masks, dict(outcome.metrics), outcome.steps, final
        )
        self._masks.append(self._pruned(model, masks))
        self._done.append(result)
        if self._files is not None:
            rewound = self._rewound if wanted is not None else None
            self._files.save(SavedRound(result, self._masks[-1], rewound))

    def _load_start(self, model: nn.Module, number: int) -> int:
        """Put the model where the round begins; returns the step that is."""
        if number == 0:
            return 0
        if self.reset == "at_end" and number < self.rounds:
            model.load_state_dict(self._done[-1].final_state)
            return 0
        rewind(model, self._ticket_start())
        return self.rewind_to

    def _pruned(self, model: nn.Module, masks: MaskSet) -> MaskSet:
        """The next masks: the smallest of the alive weights leave, and none returns."""
        scores = compute_scores(self._select(model), "magnitude")
        alive = {name: int(mask.sum()) for name, mask in masks.items()}
        if self.scope == "layer":
            keep = {n: alive[n] - pruned_count(alive[n], self.rates[n]) for n in masks}
            return build_masks(scores, keep=keep, within=masks)
        total = sum(alive.values())
        left = max(total - pruned_count(total, next(iter(self.rates.values()))), len(masks))
        return build_masks(
            _with_survivors(scores, masks), left / masks.numel, scope="global", within=masks
        )

    # ---------------------------------------------------------------------- tickets and controls

    def winning_ticket(self, round: int) -> tuple[State, MaskSet]:
        """The ticket of a round: the state it starts from, and its masks.

        Args:
            round: 0 is the dense network, 1 what the first pruning left, and so on.

        Returns:
            State dict with the pruned weights zero, for step ``rewind_to``, and the masks.

        Raises:
            ValueError: a round that has not been reached.
        """
        return self._started(round, lambda model, masks: None)

    def random_reinit(self, round: int, seed: int) -> tuple[State, MaskSet]:
        """Control: the ticket's masks on newly drawn initial weights (for step 0).

        Raises:
            ValueError: ``model_fn`` made the same weights again, so it is no control.
        """
        masks = self._masks_of(round)
        model = self._build(seed)
        if same_state(self._initial, Snapshot.capture(model)):
            raise ValueError(f"model_fn made the same initial weights from seed {seed}")
        masks.apply_(model)
        return _state_of(model), masks.clone()

    def shuffled_mask(self, round: int, seed: int) -> tuple[State, MaskSet]:
        """Control: the ticket's initial values under masks permuted within each layer."""
        source = torch.Generator().manual_seed(seed)
        masks = shuffle_masks(self._masks_of(round), "layerwise", source)
        model = self._build(self._seed)
        rewind(model, self._ticket_start(), masks=masks)
        return _state_of(model), masks

    def reuse(self, round: int, seed: int, keep_sign: bool = False) -> tuple[State, MaskSet]:
        """Control: initial values drawn from those of the layer's survivors, with replacement.

        Args:
            round: of the ticket.
            seed: of the draw.
            keep_sign: every weight keeps its sign, only magnitudes are drawn.
        """
        source = torch.Generator().manual_seed(seed)
        mode: Literal["constant_sign", "shuffle"] = "constant_sign" if keep_sign else "shuffle"

        def resample(model: nn.Module, masks: MaskSet) -> None:
            reinitialize(model, mode, masks=masks, replace=True, generator=source)

        return self._started(round, resample)

    def _started(
        self, round: int, change: Callable[[nn.Module, MaskSet], None]
    ) -> tuple[State, MaskSet]:
        masks = self._masks_of(round)
        model = self._build(self._seed)
        rewind(model, self._ticket_start(), masks=masks)
        change(model, masks)
        return _state_of(model), masks.clone()

    def _masks_of(self, round: int) -> MaskSet:
        if not 0 <= round < len(self._masks):
            raise ValueError(
                f"round must be in [0, {len(self._masks) - 1}] after {len(self._done)} trainings, "
                f"got {round}"
            )
        return self._masks[round]

    def _ticket_start(self) -> Snapshot:
        if self._rewound is None:
            raise ValueError(
                f"the state at rewind_to={self.rewind_to} is not captured yet: run() first"
            )
        return self._rewound

    # ------------------------------------------------------------------------------- persistence

    def _settings(self) -> dict[str, Any]:
        return {
            "scope": self.scope,
            "rates": dict(self.rates),
            "rewind_to": self.rewind_to,
            "reset": self.reset,
            # With the second strategy the last round differs from the others.
            "rounds": self.rounds if self.reset == "at_end" else None,
        }

    def _restore(self, files: RoundFiles, selection: ParamSelection) -> None:
        for number in range(self.rounds + 1):
            saved = files.load(number, selection, self._masks[number])
            if saved is None:
                return
            self._done.append(saved.result)
            self._masks.append(saved.next_masks)
            self._rewound = saved.rewound or self._rewound

    # ------------------------------------------------------------------------------------ pieces

    def _build(self, seed: int) -> nn.Module:
        devices = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return self._model_fn()

    def _select(self, model: nn.Module) -> ParamSelection:
        return select_parameters(model, exclude=self.exclude)

    def _check_repeatable(self) -> None:
        if not same_state(self._initial, Snapshot.capture(self._build(self._seed))):
            raise ValueError(
                "model_fn made different weights from the same seed: it must take its randomness "
                "from torch's global generators"
            )

    def _check_outcome(
        self, model: nn.Module, masks: MaskSet, outcome: TrainOutcome, wanted: int | None
    ) -> None:
        for name, weight in self._select(model).weights().items():
            if bool((weight[~masks[name]] != 0).any()):
                raise ValueError(
                    f"train_fn moved pruned weights of {name!r}; hold the masks it is given, e.g. "
                    f"with StaticSparseTrainer"
                )
        if self._done and outcome.steps != self._done[0].steps:
            raise ValueError(
                f"train_fn trained for {outcome.steps} steps, {self._done[0].steps} before: every "
                f"round must train as long"
            )
        if self.rewind_to >= outcome.steps:
            raise ValueError(
                f"rewind_to must be below the {outcome.steps} steps of a training, "
                f"got {self.rewind_to}"
            )
        if wanted is not None and (outcome.snapshot is None or outcome.snapshot.step != wanted):
            found = None if outcome.snapshot is None else outcome.snapshot.step
            raise ValueError(
                f"train_fn captured no snapshot at rewind_to={wanted} (its step is {found})"
            )


def _check_plan(
    rounds: int,
    scope: str,
    rewind_to: int,
    reset: str,
    rate: float | Mapping[str, float],
    output_rate: float | None,
) -> None:
    check_count("rounds", rounds)
    check_count("rewind_to", rewind_to, 0)
    check_choice("scope", scope, _SCOPES)
    check_choice("reset", reset, _RESETS)
    named: dict[str, float]
    if isinstance(rate, Mapping):
        named = {f"rate[{glob!r}]": each for glob, each in rate.items()}
    else:
        named = {"rate": rate}
    if output_rate is not None:
        named["output_rate"] = output_rate
    for name, value in named.items():
        check_number(name, value, "(0, 1)")
    if scope == "global" and (isinstance(rate, Mapping) or output_rate is not None):
        raise ValueError(
            "scope='global' ranks all weights together, so it has one rate: no rates per layer, "
            "no output_rate; leave layers dense with exclude"
        )


def _rates_of(
    model: nn.Module,
    selection: ParamSelection,
    rate: float | Mapping[str, float],
    output_rate: float | None,
    scope: str,
) -> dict[str, float]:
    """Share of each layer's alive weights that a round prunes."""
    globs = rate if isinstance(rate, Mapping) else {"*": rate}
    unused = set(globs)
    rates = {}
    for name in selection:
        owner = name.rpartition(".")[0]
        matching = [g for g in globs if fnmatchcase(name, g) or fnmatchcase(owner, g)]
        if not matching:
            raise ValueError(f"rate has nothing for {name!r}; its globs are {list(globs)}")
        unused -= set(matching)
        rates[name] = globs[matching[0]]
    if unused:
        raise ValueError(f"rate: no layer matches {sorted(unused)}")
    last, ref = list(select_parameters(model).items())[-1]
    if scope == "layer" and last in rates and isinstance(ref.module, nn.Linear):
        rates[last] = rates[last] / 2 if output_rate is None else output_rate
    return rates


def _with_survivors(scores: Mapping[str, Tensor], masks: MaskSet) -> dict[str, Tensor]:
    """Scores in which the best alive weight of each layer beats all others: no layer vanishes."""
    top = max(float(score.max()) for score in scores.values())
    raised = {}
    for name, score in scores.items():
        best = score.masked_fill(~masks[name], -1.0).argmax()
        raised[name] = score.clone()
        raised[name].view(-1)[best] = 2.0 * top + 1.0
    return raised


def _state_of(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# A round prunes about this share, in as many rounds as the sparsity needs (the paper's 20 %).
_SEARCH_RATE = 0.2


def _search(trainings: Trainings, goal: Goal) -> nn.Module:
    """The sparsest ticket, trained: rounds of equal shares that end at the goal's sparsity."""
    if goal.sparsity == 0.0:
        return trainings.trained()
    rounds = max(1, math.ceil(math.log(1.0 - goal.sparsity) / math.log(1.0 - _SEARCH_RATE)))
    rate = Geometric(goal.sparsity, rounds).fraction

    def train(
        model: nn.Module, masks: MaskSet, start: int, snapshot_at: int | None
    ) -> TrainOutcome:
        score = trainings.train(model, masks, f"ticket-{masks.nnz}", goal.seed)
        return TrainOutcome(goal.steps, {"score": score})

    names = select_parameters(trainings.fresh(goal.seed))
    search = LotteryTicket(
        lambda: trainings.fresh(goal.seed),
        train,
        rounds=rounds,
        rate=rate,
        output_rate=rate,
        exclude=[name for name in names if name not in goal.parameters],
        run_dir=trainings.folder / "tickets",
    )
    best = search.run().rounds[-1]
    model = trainings.fresh(goal.seed)
    model.load_state_dict(best.final_state)
    return model


METHOD = SearchMethod(slug="lottery-ticket", search=_search, patterns=("unstructured",))
