"""One-shot pruning without training: magnitude, Wanda and SparseGPT.

    masks = wanda_(model, batches, sparsity=0.5)               # in place, block by block
    masks = sparsegpt_(model, batches, pattern="2:4")          # also repairs the kept weights

| | score | competes within | weights kept | needs |
| --- | --- | --- | --- | --- |
| magnitude | abs(w) | layer, row or network | unchanged | nothing |
| Wanda | abs(w_ij) * norm_j | row | unchanged | inputs, O(features) memory a layer |
| SparseGPT | w_ij^2 / U_jj^2 | block of 128 columns | repaired | inputs, O(features^2) memory |

Use Wanda for speed and SparseGPT for accuracy; the gap grows with sparsity and with correlated
inputs. Calibration walks the model block by block (see `calibrate`), so blocks are pruned with
inputs that their pruned predecessors produce.

Reference: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda),
arXiv 2306.11695; Frantar & Alistarh, "SparseGPT", arXiv 2301.00774.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aerogel.arguments import check_number
from aerogel.sparsity.blocks import ForwardFn, run_batch
from aerogel.sparsity.calibrate import TokenMask
from aerogel.sparsity.input_stats import InputStats
from aerogel.sparsity.layer_walk import (
    LayerWalk,
    ProgressFn,
    as_stored,
    oriented_weight,
    selected_weights,
)
from aerogel.sparsity.mask_set import MaskSet
from aerogel.sparsity.masks import build_masks
from aerogel.sparsity.obs import SPARSEGPT_BLOCK, check_sparsegpt_options, sparsegpt_weight
from aerogel.sparsity.patterns import GroupPattern, Pattern, Unstructured, parse_pattern
from aerogel.sparsity.scores import OBS_DAMPING
from aerogel.sparsity.select import ParamRef, ParamSelection

DEFAULT_SPARSITY = 0.5


def magnitude_(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    scope: Literal["layer", "row", "global"] = "layer",
    pattern: str | Pattern | None = None,
    selection: ParamSelection | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> MaskSet:
    """Zero the smallest weights, in place.

    Args:
        model: any module.
        sparsity: fraction of zeros in [0, 1); None is 0.5, or what an N:M pattern fixes.
        scope: who competes: each layer, each output row (count rounded down), or the network.
        pattern: what lives or dies together, e.g. "2:4" or "4x1"; None is unstructured.
        selection: the weights; None takes linear and convolution weights by `include`/`exclude`.
        include: globs of names, see `select_parameters`.
        exclude: globs of names.

    Returns:
        The masks, True = kept.

    Raises:
        ValueError: sparsity outside [0, 1) or at odds with the pattern, NaN weights, or nothing
            selected.
    """
    chosen = selected_weights(model, selection, include, exclude)
    shape = parse_pattern(pattern) if pattern is not None else Unstructured()
    density = 1.0 - checked_sparsity(sparsity, shape)
    with torch.no_grad():
        scores = {name: oriented_weight(ref).abs() for name, ref in chosen.items()}
        rounding: Literal["floor", "round"] = "floor" if scope == "row" else "round"
        masks = build_masks(scores, density, shape, scope, rounding=rounding)
        stored = MaskSet({name: as_stored(ref, masks[name]) for name, ref in chosen.items()})
        for name, ref in chosen.items():
            ref.parameter.masked_fill_(~stored[name], 0.0)
    return stored


def wanda_(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float | None = None,
    pattern: str | Pattern | None = None,
    *,
    selection: ParamSelection | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    sequential: bool | None = None,
    blocks: str | None = None,
    token_mask: TokenMask = "attention_mask",
    forward: ForwardFn = run_batch,
    on_progress: ProgressFn | None = None,
) -> MaskSet:
    """Zero the weights of smallest abs(w_ij) * norm of input j, row by row, in place.

    Kept weights are bitwise unchanged. If an error comes up half way (NaN inputs in a late block),
    the blocks before it are already pruned.

    Args:
        model: any module, for example a transformers encoder or decoder.
        batches: calibration batches as `run_batch` takes them; the paper uses 128 sequences.
        sparsity: fraction of zeros in [0, 1); floor(sparsity * in) are pruned in every row. None is
            0.5, or what an N:M pattern fixes.
        pattern: None (unstructured), "2:4", "4x1", ...
        selection: the weights; None takes the linear and convolution weights inside the model's
            blocks (embeddings and heads stay dense), or all of them if there are no blocks.
        include: globs of names, see `select_parameters`; overrides the restriction to blocks.
        exclude: globs of names.
        sequential: walk block by block; None does so where the model has a chain of blocks.
        blocks: name of the block list, None to find it.
        token_mask: which tokens count, see `collect_input_stats`.
        forward: how to run one batch.
        on_progress: called as (layers done, layers in all, name) after each layer.

    Returns:
        The masks, True = kept.

    Raises:
        ValueError: bad sparsity or pattern, no batch, NaN or infinite inputs (names the layer),
            meta or integer weights, `sequential=True` without blocks.

    Reference: arXiv 2306.11695, section 3.
    """
    shape = parse_pattern(pattern) if pattern is not None else Unstructured()
    wanted = checked_sparsity(sparsity, shape)
    masks: dict[str, Tensor] = {}

    def prune(ref: ParamRef, stats: InputStats) -> None:
        mask = wanda_mask(oriented_weight(ref), stats, wanted, shape, name=ref.name)
        masks[ref.name] = as_stored(ref, mask)
        ref.parameter.masked_fill_(~masks[ref.name], 0.0)

    walk = LayerWalk(model, batches, sequential, blocks, token_mask, forward, on_progress)
    chosen = walk.select(shape, selection, include, exclude)
    walk.each(chosen, ["sumsq"], prune)
    return MaskSet({name: masks[name] for name in chosen})


def sparsegpt_(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float | None = None,
    pattern: str | Pattern | None = None,
    *,
    block: int = SPARSEGPT_BLOCK,
    damp: float = OBS_DAMPING,
    selection: ParamSelection | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    sequential: bool | None = None,
    blocks: str | None = None,
    token_mask: TokenMask = "attention_mask",
    forward: ForwardFn = run_batch,
    on_progress: ProgressFn | None = None,
) -> MaskSet:
    """Prune and repair: the kept weights make up for the pruned ones on the calibration inputs.

    Args:
        model: as in `wanda_`.
        batches: as in `wanda_`.
        sparsity: fraction of zeros in [0, 1), exact per layer (rounded down); None is 0.5, or what
            an N:M pattern fixes.
        pattern: None (unstructured) or N:M along the inputs, e.g. "2:4".
        block: columns decided together (and updated lazily).
        damp: share of the mean Hessian diagonal added to it, > 0.
        selection: as in `wanda_`.
        include: as in `wanda_`.
        exclude: as in `wanda_`.
        sequential: as in `wanda_`.
        blocks: as in `wanda_`.
        token_mask: as in `wanda_`.
        forward: as in `wanda_`.
        on_progress: as in `wanda_`.

    Returns:
        The masks, True = kept.

    Raises:
        ValueError: as `wanda_`; also a pattern other than unstructured and N:M, block < 1 or
            damp <= 0.

    Reference: arXiv 2301.00774, algorithm 1.
    """
    shape = parse_pattern(pattern) if pattern is not None else Unstructured()
    wanted = checked_sparsity(sparsity, shape)
    check_sparsegpt_options(shape, block, damp)
    masks: dict[str, Tensor] = {}

    def prune(ref: ParamRef, stats: InputStats) -> None:
        weight = oriented_weight(ref)
        repaired, mask = sparsegpt_weight(
            weight, stats.hessian, wanted, shape, block=block, damp=damp, name=ref.name
        )
        masks[ref.name] = as_stored(ref, mask)
        ref.parameter.copy_(as_stored(ref, repaired))

    walk = LayerWalk(model, batches, sequential, blocks, token_mask, forward, on_progress)
    chosen = walk.select(shape, selection, include, exclude)
    walk.each(chosen, ["hessian"], prune)
    return MaskSet({name: masks[name] for name in chosen})


def wanda_mask(
    weight: Tensor,
    stats: InputStats,
    sparsity: float,
    pattern: Pattern | None = None,
    *,
    name: str = "weight",
) -> Tensor:
    """Wanda's mask of one weight.

    Args:
        weight: (out, in/groups, *kernel).
        stats: statistics of the layer's input.
        sparsity: fraction of zeros in every row, ignored by patterns that fix it.
        pattern: None is unstructured.
        name: named in errors.

    Returns:
        Bool mask of the weight's shape, True = kept.

    Reference: arXiv 2306.11695, equation 2.
    """
    check_number("sparsity", sparsity, "[0, 1)")
    score = weight.abs().float() * stats.per_weight(stats.norm, weight.shape).to(weight.device)
    return row_mask(score, sparsity, pattern, name=name)


def row_mask(
    score: Tensor, sparsity: float, pattern: Pattern | None = None, *, name: str = "weight"
) -> Tensor:
    """The mask that keeps the best of every row, or of every group of an N:M pattern.

    Args:
        score: (out, ...), higher = keep.
        sparsity: floor(sparsity * in) are pruned in every row; ignored by patterns that fix it.
        pattern: None is unstructured.
        name: named in errors.

    Returns:
        Bool mask of the score's shape, True = kept.
    """
    shape = pattern if pattern is not None else Unstructured()
    density = None if isinstance(shape, GroupPattern) else 1.0 - sparsity
    scope: Literal["group", "row"] = "group" if density is None else "row"
    return build_masks({name: score}, density, shape, scope, rounding="floor")[name]


def checked_sparsity(sparsity: float | None, pattern: Pattern) -> float:
    """The sparsity meant: in [0, 1), 0.5 by default, and what the pattern fixes if it fixes it.

    Raises:
        ValueError: outside [0, 1), or at odds with an N:M pattern.
    """
    fixed = pattern.fixed_density
    if sparsity is None:
        return DEFAULT_SPARSITY if fixed is None else 1.0 - fixed
    check_number("sparsity", sparsity, "[0, 1)")
    if fixed is not None and abs(sparsity - (1.0 - fixed)) > 1e-6:
        raise ValueError(
            f"sparsity={sparsity} contradicts pattern {pattern}: it has {1.0 - fixed:g}"
        )
    return float(sparsity)
