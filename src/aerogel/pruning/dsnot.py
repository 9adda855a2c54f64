"""DSnoT: repair the mask of a pruned language model without training and without new weights.

Paper: Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
ICLR 2024, arXiv 2310.08915. It starts from the masks of Wanda (arXiv 2306.11695), SparseGPT
(arXiv 2301.00774) or magnitude.

The idea: what a row of a linear layer lost by pruning is, on average over the inputs, the sum of
its pruned weights times the means of their inputs. Row by row, a pruned weight that brings this
expected error nearest to zero is grown back and a kept one of the least Wanda score, whose removal
moves the error the same way, is pruned for it; again and again until the error is small. No weight
changes its value, so there is nothing to train and nothing to overfit.

When to use it: after one-shot pruning of a large transformer at 60 % zeros and more, when SparseGPT
is too slow or must not touch the weights. The gain grows with sparsity and with the weakness of the
start; at 50 % on top of Wanda there is little to win.

Costs and buys: one sweep over a few calibration sequences, which Wanda needs anyway, and a few
sorts a layer: seconds where SparseGPT takes minutes. It buys part of the quality that retraining
would bring back. Masks stay unstructured or N:M, so the kernels are those of any such weight
(`aerogel.compile`, `aerogel.save`).

The claim this repository measures (``aerogel reproduce dsnot``): on a pretrained sentence encoder
at 60 % zeros, DSnoT brings the embeddings nearer to the dense ones on top of magnitude and of
Wanda, and more so at 70 %. On a small language model with a tiny calibration set it repairs
magnitude's masks by far, but refining all layers does not better Wanda's; refining attention only
(``skip="mlp"``) does so by a little. Score held-out text both ways before choosing.

Beside the authors' code, on the first block of that language model and the same sequences: the
same masks at 60 % from Wanda's, but for a few rows whose sums round otherwise. Carried through all
blocks such rows grow: its perplexity is 151 where ours is 156 to 160, and Wanda's 143. Differences:
there an N:M row may end with a larger error than it began with, and some lose their pattern; here
it gets its starting mask back. Of equal scores the code prunes the first, this keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from aerogel.arguments import check_count, check_number
from aerogel.pruning.method import Goal, OneShotMethod, call_with_inputs
from aerogel.sparsity.blocks import ForwardFn, find_blocks, run_batch
from aerogel.sparsity.calibrate import TokenMask
from aerogel.sparsity.input_stats import InputStats
from aerogel.sparsity.layer_walk import LayerWalk, ProgressFn, as_stored, oriented_weight
from aerogel.sparsity.mask_set import MaskSet
from aerogel.sparsity.oneshot import checked_sparsity, row_mask
from aerogel.sparsity.patterns import NM, Pattern, Unstructured, parse_pattern
from aerogel.sparsity.scores import SCORES, ScoreContext
from aerogel.sparsity.select import ParamRef, ParamSelection, unknown_name
from aerogel.sparsity.swaps import GroupSwaps, LayerRefinement, RowSwaps, swap_until_small
from aerogel.sparsity.topk import require_finite

Start = Literal["wanda", "magnitude", "sparsegpt"]
Skip = Literal["mlp"]
Variance = Literal["within", "pooled"]

MAX_CYCLES = 50
# In the units of mu, which is a sum over the tokens of a sequence; the value of the released code.
THRESHOLD = 0.1
# Below this a variance counts as rounding noise of a constant feature.
VARIANCE_FLOOR = 1e-12

_START_SCORES: dict[str, str] = {"wanda": "wanda", "magnitude": "magnitude", "sparsegpt": "obs"}


@dataclass
class DSnoTReport:
    """What `dsnot_` did.

    Attributes:
        masks: the final masks of all pruned weights, True = kept.
        layers: name to `LayerRefinement`, in the order of the walk; layers that ``skip`` left at
            their starting mask are not in it.
        start: ``"wanda"``, ``"magnitude"`` or ``"sparsegpt"``; ``"given"``: made elsewhere.
        pattern: the pattern, as a string.
        skip: which layers kept their starting mask.
    """

    masks: MaskSet
    layers: dict[str, LayerRefinement]
    start: str
    pattern: str
    skip: Skip | None

    @property
    def swaps(self) -> int:
        """Weights grown over all layers."""
        return sum(layer.swaps for layer in self.layers.values())

    @property
    def error_reduction(self) -> float:
        """Mean over layers of 1 - error_after / error_before; 0 where there was no error."""
        parts = [
            1.0 - layer.error_after / layer.error_before if layer.error_before > 0 else 0.0
            for layer in self.layers.values()
        ]
        return sum(parts) / max(1, len(parts))


def dsnot_(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float | None = None,
    *,
    start: Start | Mapping[str, Tensor] = "wanda",
    pattern: Pattern | str | None = None,
    max_cycles: int = MAX_CYCLES,
    threshold: float = THRESHOLD,
    var_power: float = 1.0,
    var: Variance = "within",
    keep_sign: bool | None = None,
    skip: Skip | None = None,
    selection: ParamSelection | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    sequential: bool | None = True,
    blocks: str | None = None,
    token_mask: TokenMask = "attention_mask",
    forward: ForwardFn = run_batch,
    on_progress: ProgressFn | None = None,
) -> DSnoTReport:
    """Prune a model and refine its masks, in place; kept weights are bitwise the dense ones.

    The model is walked block by block: a block is calibrated dense on what its pruned predecessors
    produce. If an error comes up half way (NaN inputs in a late block), the blocks before it are
    already pruned.

    Args:
        model: a Hugging Face causal language model or encoder, or any module with a list of blocks.
        batches: calibration batches as `run_batch` takes them; the paper uses 128 sequences of
            2048 tokens.
        sparsity: fraction of zeros in [0, 1); floor(sparsity * in) are pruned in every row. None is
            0.5, or what an N:M pattern fixes.
        start: the score whose masks are refined, per row: ``"wanda"``, ``"magnitude"`` or
            ``"sparsegpt"`` (its score only: weights are not updated). Or masks made elsewhere, by
            name and of the shape of the stored weights; the pruned weights must then still hold
            their dense values, and ``sparsity`` is not used.
        pattern: None (unstructured) or N:M along the inputs, e.g. ``"2:4"``.
        max_cycles: swaps in a row at most.
        threshold: a row stops once abs(expected error) is no more than this, in the units of a sum
            over the tokens of one sequence.
        var_power: exponent of the input variance by which a weight's benefit is divided; 0 ignores
            the variance.
        var: ``"within"`` sequences, as the paper's code computes it, or ``"pooled"`` over tokens.
        keep_sign: stop a row before a swap that would turn the sign of its error. None: only for
            N:M, as in the paper's code.
        skip: ``"mlp"`` refines attention projections only (the default of the paper's code); None
            refines all layers.
        selection: the weights; None takes the linear and convolution weights inside the blocks.
        include: globs of names, see `select_parameters`; overrides the restriction to blocks.
        exclude: globs of names.
        sequential: False takes all statistics from the dense model in one pass, for models without
            a chain of blocks; None does so where there is none.
        blocks: name of the block list, None to find it.
        token_mask: which tokens count, see `collect_input_stats`.
        forward: how to run one batch.
        on_progress: called as (layers done, layers in all, name) after each layer.

    Returns:
        The masks and what happened in each layer.

    Raises:
        ValueError: bad sparsity, pattern or option, no batch, a sequence longer than the model's
            context, NaN or infinite inputs (names the layer), meta or integer weights, a model
            without blocks, or a missing mask.

    Reference: arXiv 2310.08915, algorithm 1.
    """
    shape = _checked_pattern(pattern)
    wanted = checked_sparsity(sparsity, shape)
    options = _Options(max_cycles, threshold, var_power, var, keep_sign)
    _check_choice("skip", skip, (*get_args(Skip), None))
    if not isinstance(start, Mapping):
        _check_choice("start", start, get_args(Start))
    walk = LayerWalk(model, batches, sequential, blocks, token_mask, forward, on_progress)
    chosen = walk.select(shape, selection, include, exclude)
    given = _checked_masks(start, chosen) if isinstance(start, Mapping) else None
    refined = _refined_names(model, walk, chosen, skip)
    masks: dict[str, Tensor] = {}
    layers: dict[str, LayerRefinement] = {}

    def prune(ref: ParamRef, stats: InputStats) -> None:
        weight = oriented_weight(ref)
        score = _score("wanda" if given is not None else str(start), ref, weight, stats)
        if given is None:
            mask = row_mask(score, wanted, shape, name=ref.name)
        else:
            mask = as_stored(ref, given[ref.name].to(weight.device))
        if ref.name in refined:
            mask, layers[ref.name] = _refine(weight, mask, stats, shape, score, options, ref.name)
        masks[ref.name] = as_stored(ref, mask)
        ref.parameter.masked_fill_(~masks[ref.name], 0.0)

    needed = ["sum", "sumsq", "var", *(["hessian"] if start == "sparsegpt" else [])]
    walk.each(chosen, needed, prune)
    return DSnoTReport(
        MaskSet({name: masks[name] for name in chosen}),
        layers,
        "given" if given is not None else str(start),
        str(shape),
        skip,
    )


def refine_mask(
    weight: Tensor,
    mask: Tensor,
    stats: InputStats,
    *,
    pattern: Pattern | str | None = None,
    score: Tensor | None = None,
    max_cycles: int = MAX_CYCLES,
    threshold: float = THRESHOLD,
    var_power: float = 1.0,
    var: Variance = "within",
    keep_sign: bool | None = None,
    name: str = "weight",
) -> Tensor:
    """Swap kept for pruned weights, row by row, until each row's expected output error is small.

    Args:
        weight: (out, in/groups, *kernel), the dense weight.
        mask: bool, of its shape, True = kept; from whatever method.
        stats: of the layer's input, with "sum", "sumsq" and "var".
        pattern: None keeps the number of weights in every row, N:M also that of every group.
        score: for N:M, the score of the starting mask (higher = keep), by which the partner of a
            grown weight is chosen; None is Wanda's.
        max_cycles: as in `dsnot_`.
        threshold: as in `dsnot_`.
        var_power: as in `dsnot_`.
        var: as in `dsnot_`.
        keep_sign: as in `dsnot_`.
        name: named in errors.

    Returns:
        The new mask; the inputs are unchanged.

    Raises:
        ValueError: shapes that differ, a mask that does not satisfy the pattern, a bad option.

    Reference: arXiv 2310.08915, section 3.
    """
    shape = _checked_pattern(pattern)
    options = _Options(max_cycles, threshold, var_power, var, keep_sign)
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"{name}: mask is {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool of "
            f"the weight's shape {tuple(weight.shape)}"
        )
    shape.validate(weight.shape, name)
    with torch.no_grad():
        return _refine(weight.detach(), mask, stats, shape, score, options, name)[0]


@dataclass(frozen=True)
class _Options:
    max_cycles: int
    threshold: float
    var_power: float
    var: Variance
    keep_sign: bool | None

    def __post_init__(self) -> None:
        check_count("max_cycles", self.max_cycles, 0)
        check_number("threshold", self.threshold, "[0, inf)")
        check_number("var_power", self.var_power, "[0, inf)")
        _check_choice("var", self.var, get_args(Variance))


def _refine(
    weight: Tensor,
    mask: Tensor,
    stats: InputStats,
    pattern: Pattern,
    score: Tensor | None,
    options: _Options,
    name: str,
) -> tuple[Tensor, LayerRefinement]:
    """`refine_mask` with its arguments checked; also says what happened."""
    require_finite(weight, name)

    def rows(value: Tensor) -> Tensor:  # [out, F], channels innermost, as N:M groups run
        return value.movedim(1, -1).flatten(1) if value.ndim > 2 else value

    def per_weight(vector: Tensor) -> Tensor:
        return rows(stats.per_weight(vector, weight.shape).to(weight.device))

    dense, kept = rows(weight).float(), rows(mask).clone()
    wanda = dense.abs() * per_weight(stats.norm)
    loss = dense * per_weight(stats.signed_mean)  # c: what the row's output loses without it
    benefit = loss
    if options.var_power:
        variance = stats.var if options.var == "within" else stats.pooled_var
        spread = per_weight(variance).clamp_min(VARIANCE_FLOOR)
        benefit = loss / spread.pow(options.var_power)
    if isinstance(pattern, NM):
        if not pattern.is_satisfied(mask):
            raise ValueError(f"{name}: the mask to refine does not satisfy {pattern}")
        ranking = wanda if score is None else rows(score).float()
        swaps: RowSwaps | GroupSwaps = GroupSwaps(
            kept, loss, benefit, ranking, pattern.m, options.max_cycles
        )
    else:
        swaps = RowSwaps(kept, loss, benefit, wanda, options.max_cycles)
    report = swap_until_small(
        swaps,
        loss.masked_fill(kept, 0.0).sum(1),
        threshold=options.threshold,
        max_cycles=options.max_cycles,
        keep_sign=isinstance(pattern, NM) if options.keep_sign is None else options.keep_sign,
    )
    refined = swaps.mask()
    if weight.ndim > 2:
        refined = refined.unflatten(1, (*weight.shape[2:], weight.shape[1])).movedim(-1, 1)
    return refined.contiguous(), report


def _score(kind: str, ref: ParamRef, weight: Tensor, stats: InputStats) -> Tensor:
    context = ScoreContext(weights={ref.name: weight.float()}, statistics={ref.name: stats})
    return SCORES[_START_SCORES[kind]](ref.name, ref.module, context)


def _checked_pattern(pattern: Pattern | str | None) -> Pattern:
    shape = parse_pattern(pattern) if pattern is not None else Unstructured()
    if isinstance(shape, Unstructured) or (isinstance(shape, NM) and shape.axis == 1):
        return shape
    raise ValueError(f"DSnoT knows unstructured and N:M along inputs, not pattern={shape}")


def _check_choice(argument: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise ValueError(f"{argument}={value!r} must be one of {list(known)}")


def _checked_masks(masks: Mapping[str, Tensor], chosen: ParamSelection) -> Mapping[str, Tensor]:
    for name, ref in chosen.items():
        if name not in masks:
            raise ValueError(f"start: {unknown_name('mask', name, list(masks))}")
        if masks[name].shape != ref.shape or masks[name].dtype != torch.bool:
            raise ValueError(
                f"start[{name!r}] is {masks[name].dtype} of shape {tuple(masks[name].shape)}, "
                f"expected torch.bool of shape {tuple(ref.shape)}"
            )
    return masks


def _refined_names(
    model: nn.Module, walk: LayerWalk, chosen: ParamSelection, skip: Skip | None
) -> set[str]:
    """The layers to refine; what is not part of an attention counts as MLP."""
    if skip is None:
        return set(chosen)
    root = find_blocks(model, walk.blocks)[0] if walk.sequential else ""
    attention = {
        name
        for name in chosen
        if any(word in name.removeprefix(root).lower() for word in ("attn", "attention"))
    }
    if not attention:
        raise ValueError("skip='mlp': no selected layer is part of a module named like attention")
    return attention


def _prune(
    model: nn.Module,
    batches: Iterable[Any],
    goal: Goal,
    progress: ProgressFn,
) -> MaskSet:
    report = dsnot_(
        model,
        batches,
        goal.sparsity,
        pattern=goal.pattern,
        include=goal.parameters,
        sequential=None,  # networks without blocks too
        forward=call_with_inputs,
        on_progress=progress,
    )
    return report.masks


METHOD = OneShotMethod(slug="dsnot", prune=_prune, patterns=("unstructured", "n:m"))
