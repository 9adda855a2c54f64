"""Weight averaging ("soups") for models that share one mask (P14).

Averaging networks with different zero patterns fills their zeros, so ingredients must agree on
the mask bit for bit; `average_models` checks it. Batch-norm statistics are not averages of
weights: after any averaging they are re-estimated with `recalibrate_batchnorm`.

Reference: Zimmer, Spiegel, Pokutta, "Sparse Model Soups", ICLR 2024, arXiv 2306.16788;
Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from aerogel.arguments import check_number
from aerogel.sparsity.blocks import ForwardFn, run_batch

StateDict = Mapping[str, Tensor]

# A tensor with at least this share of exact zeros in some ingredient counts as masked when no
# masks are given: trained dense weights hit exact zero far more rarely than once in a hundred.
MASKED_ZERO_SHARE = 0.01


def average_models(
    state_dicts: Iterable[StateDict],
    weights: Sequence[float] | None = None,
    *,
    masks: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Average state dicts that share one mask; zeros stay zeros.

    Streams: `state_dicts` may be a generator that loads one model at a time, and never more than
    the running mean and one ingredient are alive. Identical ingredients give a bitwise equal soup.

    Args:
        state_dicts: one state dict per ingredient, all with equal keys, shapes and dtypes.
        weights: one non-negative number per ingredient, normalised to sum 1; None is the mean.
        masks: what must agree. None compares the zeros of every tensor of two or more dimensions
            in which some ingredient is at least 1% zero. One mapping (name -> bool, True = kept)
            demands that each ingredient is zero outside it; a sequence of mappings, one per
            ingredient, demands that they are equal. `{}` switches the check off (dense soups).

    Returns:
        New state dict. Floating tensors are averaged (half precision in float32), integer and
        bool tensors such as `num_batches_tracked` are copied from the first ingredient.

    Raises:
        ValueError: no ingredient; keys, shapes, dtypes or masks differ (names the tensor);
            integer tensors that look like weights differ; weights are negative, not finite, all
            zero or of the wrong number.

    Reference: arXiv 2306.16788, section 2.
    """
    shares = _checked_weights(weights)
    soup: dict[str, Tensor] | None = None
    dtypes: dict[str, torch.dtype] = {}
    check = _MaskCheck(masks)
    total, count = 0.0, 0
    for count, state in enumerate(state_dicts, start=1):
        if shares is not None and count > len(shares):
            raise ValueError(f"weights has {len(shares)} entries, but there are more state_dicts")
        share = 1.0 if shares is None else shares[count - 1]
        total += share
        check(state, count - 1)
        if soup is None:
            dtypes = {name: tensor.dtype for name, tensor in state.items()}
            soup = {name: _accumulator(tensor) for name, tensor in state.items()}
        else:
            _check_like_first(soup, dtypes, state, count - 1)
            _accumulate_(soup, state, share / total if total > 0 else 0.0)
        del state
    if soup is None:
        raise ValueError("state_dicts is empty; averaging needs at least one model")
    if shares is not None and count != len(shares):
        raise ValueError(f"weights has {len(shares)} entries for {count} state_dicts")
    return {name: tensor.to(dtypes[name]) for name, tensor in soup.items()}


@dataclass(frozen=True)
class GreedySoup:
    """What `greedy_soup` chose.

    Attributes:
        state: the averaged state dict.
        members: indices into `candidates`, in the order they joined.
        score: validation score of `state`.
        candidate_scores: validation score of every candidate alone.
    """

    state: dict[str, Tensor]
    members: tuple[int, ...]
    score: float
    candidate_scores: tuple[float, ...]


def greedy_soup(
    candidates: Sequence[StateDict],
    val_fn: Callable[[StateDict], float],
    *,
    prepare: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> GreedySoup:
    """Add candidates, best first, to a uniform mean as long as validation does not get worse.

    Args:
        candidates: state dicts sharing one mask; only indexed, so a sequence that loads from disk
            on `[i]` keeps memory at three models.
        val_fn: state dict -> validation score, higher is better.
        prepare: applied to every soup before it is scored and returned, normally batch-norm
            recalibration (state dict -> state dict).
        masks: as in `average_models`.

    Returns:
        `GreedySoup`; its score is never below that of the best single candidate.

    Raises:
        ValueError: no candidates, a score that is NaN, or candidates that cannot be averaged.

    Reference: arXiv 2203.05482, recipe 1; arXiv 2306.16788.
    """
    if len(candidates) == 0:
        raise ValueError("candidates is empty; a soup needs at least one ingredient")
    scores = tuple(_score(val_fn, candidates[i], f"candidate {i}") for i in range(len(candidates)))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    members = [order[0]]
    mean = average_models([candidates[order[0]]], masks=masks)
    best_state: dict[str, Tensor] = dict(mean)
    best = scores[order[0]]
    for i in order[1:]:
        size = len(members)
        trial = average_models([mean, candidates[i]], [size, 1.0], masks=masks)
        prepared = trial if prepare is None else dict(prepare(dict(trial)))
        score = _score(val_fn, prepared, f"soup of {[*members, i]}")
        if score >= best:
            members.append(i)
            mean, best_state, best = trial, prepared, score
    return GreedySoup(best_state, tuple(members), best, scores)


@dataclass(frozen=True)
class SoupDistance:
    """How far two ingredients lie apart: `l2`, `relative` = l2 / first norm, `angle` (rad)."""

    l2: float
    relative: float
    angle: float


def soup_distance(first: StateDict, second: StateDict) -> SoupDistance:
    """Distance and angle between two models over all their floating tensors.

    Raises:
        ValueError: keys or shapes differ.
    """
    if set(first) != set(second):
        raise ValueError(f"models differ in keys: {sorted(set(first) ^ set(second))[:5]}")
    difference = dot = norm_a = norm_b = 0.0
    for name, a in first.items():
        b = second[name]
        if a.shape != b.shape:
            raise ValueError(f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
        if not a.is_floating_point():
            continue
        x, y = a.detach().double().flatten(), b.detach().double().flatten()
        difference += float((x - y).square().sum())
        dot += float(x @ y)
        norm_a += float(x @ x)
        norm_b += float(y @ y)
    scale = math.sqrt(norm_a * norm_b)
    cosine = 1.0 if scale == 0.0 else max(-1.0, min(1.0, dot / scale))
    relative = math.sqrt(difference / norm_a) if norm_a > 0 else math.inf
    return SoupDistance(math.sqrt(difference), relative, math.acos(cosine))


def recalibrate_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    fraction: float = 0.2,
    *,
    forward: ForwardFn = run_batch,
) -> int:
    """Re-estimate batch-norm running statistics from data, in place; weights are not touched.

    Statistics are reset and become the plain mean over batches of the batch statistics. Only
    batch-norm layers run in train mode; dropout and the like stay in eval mode, as at inference.

    Args:
        model: any module; a model without batch norm is left alone.
        batches: iterable of batches as `run_batch` takes them (a tensor, (inputs, labels, ...),
            or a mapping of keyword arguments).
        fraction: share of the batches to use, in (0, 1]; below 1 `batches` needs a length.
        forward: how to run one batch.

    Returns:
        Number of batches used.

    Raises:
        ValueError: fraction outside (0, 1], below 1 without a length, or no batch although the
            model has batch norm.

    Reference: arXiv 2306.16788, section 2 (fraction 0.2).
    """
    check_number("fraction", fraction, "(0, 1]")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    used = 0
    with _only_these_in_train_mode(model, norms), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average: every batch counts the same
        for batch in _share_of(batches, fraction):
            forward(model, batch)
            used += 1
    if used == 0:
        raise ValueError("batches is empty: batch norm is re-estimated from at least one batch")
    return used


def _checked_weights(weights: Sequence[float] | None) -> list[float] | None:
    if weights is None:
        return None
    values = [float(w) for w in weights]
    if any(not math.isfinite(w) or w < 0 for w in values) or sum(values) <= 0:
        raise ValueError(f"weights={values!r} must be finite, non-negative and not all zero")
    return values


def _accumulator(tensor: Tensor) -> Tensor:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.detach().to(torch.float32 if half else tensor.dtype, copy=True)


def _accumulate_(soup: dict[str, Tensor], state: StateDict, share: float) -> None:
    for name, mean in soup.items():
        if mean.is_floating_point() or mean.is_complex():
            x = state[name].detach().to(mean.dtype)
            # Equal entries are left alone: exact for identical ingredients and for infinities
            # (inf - inf is nan; causal masks kept as buffers hold them).
            moved = mean + (x - mean) * share
            mean.copy_(torch.where(x == mean, mean, moved))


def _check_like_first(
    soup: StateDict, dtypes: Mapping[str, torch.dtype], state: StateDict, index: int
) -> None:
    if set(soup) != set(state):
        wrong = sorted(set(soup) ^ set(state))[:5]
        raise ValueError(f"state_dicts[{index}] has other keys than state_dicts[0]: {wrong}")
    for name, mean in soup.items():
        other = state[name]
        if other.shape != mean.shape:
            raise ValueError(
                f"{name}: state_dicts[{index}] has shape {tuple(other.shape)}, "
                f"state_dicts[0] {tuple(mean.shape)}"
            )
        if other.dtype != dtypes[name]:
            raise ValueError(
                f"{name}: state_dicts[{index}] is {other.dtype}, state_dicts[0] {dtypes[name]}"
            )
        integer = not (mean.is_floating_point() or mean.is_complex())
        if integer and mean.ndim >= 2 and not torch.equal(mean, other):
            raise ValueError(
                f"{name}: {mean.dtype} tensors differ and cannot be averaged; "
                "dequantise integer weights first"
            )


class _MaskCheck:
    """Refuses ingredients whose masks differ; keeps one reference pattern per tensor."""

    def __init__(self, masks: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None) -> None:
        self.masks = masks
        self.reference: dict[str, Tensor] = {}

    def __call__(self, state: StateDict, index: int) -> None:
        if self.masks is None:
            self._same_zeros(state, index)
        elif isinstance(self.masks, Mapping):
            self._zero_outside(state, self.masks, index)
        else:
            if index >= len(self.masks):
                raise ValueError(f"masks has {len(self.masks)} entries, one per model is needed")
            self._same_mask(self.masks[0], self.masks[index], index)
            self._zero_outside(state, self.masks[index], index)

    def _same_zeros(self, state: StateDict, index: int) -> None:
        for name, tensor in state.items():
            if tensor.ndim < 2 or not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            zeros = tensor == 0
            if index == 0:
                self.reference[name] = zeros
                continue
            before = self.reference.get(name)
            if before is None or before.shape != zeros.shape:
                continue  # keys and shapes are reported by _check_like_first
            share = max(int(before.sum()), int(zeros.sum())) / tensor.numel()
            if share >= MASKED_ZERO_SHARE and not torch.equal(before, zeros):
                _different(name, index, int((before != zeros).sum()))

    @staticmethod
    def _same_mask(first: Mapping[str, Tensor], other: Mapping[str, Tensor], index: int) -> None:
        if set(first) != set(other):
            raise ValueError(f"masks[{index}] covers other tensors than masks[0]")
        for name, mask in first.items():
            if mask.shape != other[name].shape or not torch.equal(mask, other[name]):
                _different(name, index, -1)

    @staticmethod
    def _zero_outside(state: StateDict, masks: Mapping[str, Tensor], index: int) -> None:
        for name, mask in masks.items():
            if name not in state:
                raise ValueError(f"masks names {name!r}, which state_dicts[{index}] lacks")
            if mask.shape != state[name].shape:
                raise ValueError(
                    f"{name}: mask of shape {tuple(mask.shape)} for a tensor of shape "
                    f"{tuple(state[name].shape)}"
                )
            wrong = int(((state[name] != 0) & ~mask.bool()).sum())
            if wrong:
                raise ValueError(
                    f"{name}: state_dicts[{index}] has {wrong} non-zero entries outside its mask"
                )


def _different(name: str, index: int, entries: int) -> None:
    where = f" in {entries} entries" if entries >= 0 else ""
    raise ValueError(
        f"{name}: the masks of state_dicts[0] and state_dicts[{index}] differ{where}; only models "
        "retrained from one pruned model can be averaged (pass masks= if zeros are not masks here)"
    )


def _score(val_fn: Callable[[StateDict], float], state: StateDict, who: str) -> float:
    score = float(val_fn(state))
    if math.isnan(score):
        raise ValueError(f"val_fn returned NaN for {who}")
    return score


def _share_of(batches: Iterable[Any], fraction: float) -> Iterator[Any]:
    if fraction == 1.0:
        return iter(batches)
    try:
        length = len(batches)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(
            f"fraction={fraction} needs batches with a length; pass fraction=1.0 for a generator"
        ) from None
    return islice(iter(batches), max(1, math.ceil(fraction * length)))


@contextmanager
def _only_these_in_train_mode(model: nn.Module, modules: list[_BatchNorm]) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    momenta = [module.momentum for module in modules]
    model.eval()
    for norm in modules:
        norm.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(modules, momenta, strict=True):
            norm.momentum = momentum
