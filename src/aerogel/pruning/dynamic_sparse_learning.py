"""Dynamic sparse learning: recommenders trained within one fixed budget of weights.

Paper: Wang, Sui, Wu, Zheng, Xiong, "Dynamic Sparse Learning: A Novel Paradigm for Efficient
Recommendation", WSDM 2024, arXiv 2402.02855.

The idea: a recommender is mostly one big embedding table. Instead of training it dense and
shrinking it afterwards, training starts from a random sparse table; every few hundred steps the
weakest weights are dropped and as many grown where the gradient of the loss is largest. The budget
of a tensor never changes, but it flows between its rows: users and items that matter get more.

When to use it: training matrix factorisation, LightGCN, NeuMF or Mult-VAE with 10 to 50 % of their
weights, to be served from `aerogel.models.SparseEmbeddingTable`.

Costs and buys: the backward pass is dense (growth reads the whole gradient, and Adam's moments of
masked weights stay warm), so training saves no time here; what it saves is the model's size and
the second training of train-prune-retrain.

The claim this repository measures (``aerogel reproduce dynamic-sparse-learning``): at equal budget
it ranks better than a fixed random mask and than growth at random (SET). It is no claim against a
dense table of fewer dimensions, which does as well on a small data set.

Differences from the released code: first masks have exact counts (``exact=False`` draws each entry
by itself, as there), a drop takes the n smallest rather than all below the n-th (which loses budget
on ties), padding rows are never grown, and normalisation layers stay dense.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from aerogel.arguments import check_count, check_number
from aerogel.pruning.method import Goal, TrainingMethod
from aerogel.sparsity.controlled import ControlledTrainer
from aerogel.sparsity.controller import GradScaler, MaskController
from aerogel.sparsity.coupling import HardDenseGrad
from aerogel.sparsity.masks import MaskSet, build_masks
from aerogel.sparsity.schedules import CosineFloor
from aerogel.sparsity.scores import compute_scores
from aerogel.sparsity.select import ParamRef, ParamSelection, select_parameters
from aerogel.sparsity.topk import kept_count, topk_mask
from aerogel.sparsity.updates import Death, DropGrow, Growth, UpdateContext

Init = Literal["uniform", "global_magnitude"]
Decay = Literal["cosine", "linear"]

# Of the released code.
UPDATE_RATIO = 0.5
UPDATE_FLOOR = 0.005


class DynamicSparseLearning(ControlledTrainer):
    """Trains a recommender whose mask moves at constant budget; `step` stands for the optimizer's.

    Args:
        model: any module with dense gradients.
        optimizer: its optimizer.
        density: fraction of every tensor that is kept, in (0, 1].
        total_steps: optimizer steps of the whole training.
        update_every: steps from one mask update to the next, in [1, total_steps].
        z0: share of a tensor's weights that an update swaps at the start, in (0, 1).
        z_min: the same at the end of training, in [0, z0].
        decay: ``"cosine"`` or ``"linear"``, of that share over the training.
        growth: ``"gradient"``, ``"momentum"``, ``"random"`` or ``"random_unfired"``.
        death: ``"magnitude"``, ``"set"`` (half from positive, half from negative weights) or
            ``"taylor"`` ((w g)^2).
        include_biases: also mask one-dimensional parameters, as the released code does.
        init: of the masks: ``"uniform"`` draws them at random at the density in every tensor;
            ``"global_magnitude"`` keeps the largest initial weights of all tensors together.
        exact: exact counts of a uniform start; otherwise every entry is drawn by itself, and the
            count drawn is the tensor's budget.
        reset_state: zero the optimizer state of masked weights; by default only SGD's momentum is,
            so that a grown weight starts from 0 with warm Adam moments.
        grad_accum: steps whose gradients are summed to grow by; above 1 also allows embeddings
            with ``sparse=True``, of which one step sees a few rows only.
        include: globs of parameter names to mask; all by default.
        exclude: globs of names to leave dense.
        generator: CPU generator of all random choices; seeded 0 by default.

    Raises:
        ValueError: arguments out of range, ``sparse=True`` embeddings without accumulation,
            nothing selected, a parameter that is already under masks.

    Reference:
        Wang et al., arXiv 2402.02855, algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        density: float,
        *,
        total_steps: int,
        update_every: int,
        z0: float = UPDATE_RATIO,
        z_min: float = UPDATE_FLOOR,
        decay: Decay = "cosine",
        growth: Growth = "gradient",
        death: Death = "magnitude",
        include_biases: bool = True,
        init: Init = "uniform",
        exact: bool = True,
        reset_state: bool = False,
        grad_accum: int = 1,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        _check(density, total_steps, update_every, z0, z_min, decay, grad_accum)
        if grad_accum == 1:
            _refuse_sparse_gradients(model)
        selection = select_parameters(
            model, include=tuple(include) or ("*",), exclude=exclude, biases=include_biases
        )
        source = generator or torch.Generator().manual_seed(0)
        live = {name: _live(ref) for name, ref in selection.items()}
        masks = _first_masks(selection, live, density, init, exact, source)
        self.total_steps = total_steps
        self.schedule = _SwapShare(z0, total_steps, z_min, update_every, decay)
        controller = MaskController(
            model,
            optimizer,
            selection,
            HardDenseGrad(reset_state=reset_state),
            schedule=self.schedule,
            update_rule=_SwapLive(
                growth=growth, death=death, rounding="ceil", gradient_window=grad_accum, live=live
            ),
            masks=masks,
            generator=source,
        )
        super().__init__(controller)

    def step(self, scaler: GradScaler | None = None, *, unscaled: bool = False) -> bool:
        """One optimizer step, and a mask update if due; see `MaskController.step`.

        Raises:
            ValueError: a gradient is not finite where an update is due (unless a scaler, which
                skips such steps, is given); nothing was changed then.
        """
        if self.controller.t == self.total_steps:
            warnings.warn(
                f"step() was called more than total_steps = {self.total_steps} times; "
                "updates go on at the smallest share",
                stacklevel=2,
            )
        if scaler is None and self.controller.due:
            self._require_finite_gradients()
        return self.controller.step(scaler, unscaled=unscaled)

    def fired_rate(self) -> float:
        """In-time over-parameterisation: share of the entries that were ever kept, in [d, 1]."""
        return self.controller.fired_rate()

    def row_budget(self, name: str) -> Tensor:
        """Kept entries of each row of a parameter: (rows,) int64.

        Raises:
            ValueError: no parameter of that name is under masks.
        """
        if name not in self.masks:
            raise ValueError(f"name must be one of {sorted(self.masks)}, got {name!r}")
        mask = self.masks[name]
        return mask.reshape(mask.shape[0], -1).sum(1)

    def empty_rows(self) -> dict[str, int]:
        """Rows of each matrix that have no entry left: such a user or item scores 0 by itself."""
        matrices = [name for name, mask in self.masks.items() if mask.dim() > 1]
        return {name: int((self.row_budget(name) == 0).sum()) for name in matrices}

    def _require_finite_gradients(self) -> None:
        for name, parameter in self.controller.selection.parameters().items():
            gradient = parameter.grad
            values = gradient if gradient is None or not gradient.is_sparse else gradient._values()
            if values is not None and not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"gradient of {name!r} has nan or infinite entries at step "
                    f"{self.controller.t}, where masks are to be updated by it"
                )


@dataclass(frozen=True)
class _SwapShare:
    """Share to swap after the t-th optimizer step, t counting from 1 as the released code does."""

    z0: float
    T: int
    z_min: float
    every: int
    decay: Decay

    def value(self, t: int) -> float:
        done = t + 1  # the controller's t is the number of steps before this one
        if self.decay == "linear":
            return max(self.z_min, self.z0 - (self.z0 - self.z_min) * done / self.T)
        return CosineFloor(self.z0, self.T, self.z_min, self.every).value(done)

    def due(self, t: int) -> bool:
        return (t + 1) % self.every == 0


@dataclass
class _SwapLive(DropGrow):
    """`DropGrow` that never grows a padding row."""

    live: dict[str, Tensor | None] = field(default_factory=dict)

    def _growth(self, name: str, ctx: UpdateContext) -> Tensor:
        score = super()._growth(name, ctx)
        live = self.live[name]
        return score if live is None else score.masked_fill(~live, -torch.inf)


def _check(
    density: float,
    total_steps: int,
    update_every: int,
    z0: float,
    z_min: float,
    decay: str,
    grad_accum: int,
) -> None:
    check_number("density", density, "(0, 1]")
    check_count("total_steps", total_steps)
    check_count("update_every", update_every)
    check_count("grad_accum", grad_accum)
    if update_every > total_steps:
        raise ValueError(
            f"update_every must be in [1, total_steps = {total_steps}], got {update_every}"
        )
    check_number("z0", z0, "(0, 1)")
    check_number("z_min", z_min, "[0, 1)")
    if z_min > z0:
        raise ValueError(f"z_min must be in [0, z0 = {z0}], got {z_min}")
    if decay not in ("cosine", "linear"):
        raise ValueError(f"decay must be 'cosine' or 'linear', got {decay!r}")
    if grad_accum > update_every:
        raise ValueError(
            f"grad_accum must be in [1, update_every = {update_every}], got {grad_accum}"
        )


def _refuse_sparse_gradients(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ValueError(
                f"{name!r} has sparse=True, but growth reads the dense gradient: make it "
                "sparse=False, or sum the gradients of several steps with grad_accum"
            )


def _live(ref: ParamRef) -> Tensor | None:
    """Entries that may be kept: all (None) but those of a padding row."""
    padding = getattr(ref.module, "padding_idx", None)
    if padding is None:
        return None
    live = torch.ones(ref.shape, dtype=torch.bool, device=ref.parameter.device)
    live[padding] = False
    return live


def _first_masks(
    selection: ParamSelection,
    live: Mapping[str, Tensor | None],
    density: float,
    init: str,
    exact: bool,
    generator: torch.Generator,
) -> MaskSet:
    if init == "global_magnitude":
        chosen = build_masks(compute_scores(selection, "magnitude"), density, scope="global")
    elif init == "uniform":
        chosen = MaskSet(
            {
                name: _drawn(ref, live[name], density, exact, generator)
                for name, ref in selection.items()
            }
        )
    else:
        raise ValueError(f"init must be 'uniform' or 'global_magnitude', got {init!r}")
    pairs = ((name, mask, live[name]) for name, mask in chosen.items())
    return MaskSet({name: mask if own is None else mask & own for name, mask, own in pairs})


def _drawn(
    ref: ParamRef, live: Tensor | None, density: float, exact: bool, generator: torch.Generator
) -> Tensor:
    """A mask drawn uniformly; the budget of a padding row is not given to the others."""
    draw = torch.rand(ref.shape, generator=generator, dtype=torch.float64)
    draw = draw.to(ref.parameter.device)
    if not exact:
        return draw < density
    count = ref.parameter.numel() if live is None else int(live.sum())
    if live is not None:
        draw = draw.masked_fill(~live, -torch.inf)
    return topk_mask(draw, kept_count(count, density))


def _build(model: nn.Module, optimizer: torch.optim.Optimizer, goal: Goal) -> DynamicSparseLearning:
    return DynamicSparseLearning(
        model,
        optimizer,
        1.0 - goal.sparsity,
        total_steps=goal.steps,
        update_every=max(1, math.floor(goal.steps / (goal.updates + 1))),
        # The recipe chose the weights by name; their biases are few and stay dense.
        include_biases=False,
        include=goal.parameters,
        generator=goal.generator,
    )


METHOD = TrainingMethod(
    slug="dynamic-sparse-learning", build=_build, patterns=("unstructured",), starts="fresh"
)
