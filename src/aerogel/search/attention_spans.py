"""MoA's search: a gradient profile, an integer program over heads, and a length held out.

Reference: Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model
Compression", arXiv 2406.14909.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aerogel.attention import attach, attend, detach
from aerogel.attention.hf import padding_mask
from aerogel.attention.moa import ElasticSpan, MoAPlan, MoASelector
from aerogel.search.pareto import pareto_front
from aerogel.search.span_program import SpanProgram

Batch = tuple[Tensor, Tensor]
"""Token ids (batch, length) int64 and weights (batch, length) of the tokens as targets; the answers
have weight 1, everything else 0."""

_NAME = "aerogel:moa-profile"
_EPSILON = 1e-6
_ROWS = 256  # query rows whose attention is recomputed at a time
_BETAS = tuple(n / 8 for n in range(9))


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of the weighted tokens, nats."""
    ids, weights = batch
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    weights = weights[:, 1:].to(losses.dtype)
    return (losses * weights).sum() / weights.sum()


def influence(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, scale: float, block: int) -> Tensor:
    """How much the loss would change, to first order, without each attention value, by blocks.

    An attention value A of gradient G that is removed from its row, which is then renormalised,
    changes the loss by ``-A * (G - sum(G * A)) / (1 - A)``; a row of one value by ``-G * A``.

    Args:
        q: (B, Hq, L, D).
        k: (B, Hkv, L, D).
        v: (B, Hkv, L, Dv).
        grad: (B, Hq, L, Dv), gradient of the attention's output.
        scale: factor of the logits.
        block: tokens per block; divides L.

    Returns:
        (Hq, L / block, L / block) float32: sums of absolute values over each block, mean over the
        batch; zero above the diagonal.
    """
    batch, heads, length, _ = q.shape
    groups = heads // k.shape[1]
    blocks = length // block
    total = torch.zeros(heads, blocks, blocks, device=q.device)
    rows = max(block, _ROWS // block * block)
    for begin in range(0, length, rows):
        part = slice(begin, min(begin + rows, length))
        effect = removal_effect(
            _grouped(q[:, :, part], groups), k[:, :, None], v[:, :, None],
            _grouped(grad[:, :, part], groups), scale, begin,
        )  # fmt: skip
        sums = effect.abs().flatten(1, 2).unflatten(3, (blocks, block)).sum(-1)
        sums = sums.unflatten(2, (-1, block)).sum(3)
        total[:, begin // block : begin // block + sums.shape[2]] += sums.sum(0)
    return total / batch


def removal_effect(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float, offset: int = 0
) -> Tensor:
    """(..., rows, keys): the first-order change by removing each key; see `influence`.

    Args:
        q: (..., rows, D); leading dimensions broadcast.
        k: (..., keys, D).
        v: (..., keys, Dv).
        grad: (..., rows, Dv), gradient of the output.
        scale: factor of the logits.
        offset: position of the first row.
    """
    kind = torch.promote_types(q.dtype, torch.float32)
    logits = scale * (q.to(kind) @ k.to(kind).transpose(-1, -2))
    position = offset + torch.arange(logits.shape[-2], device=q.device)[:, None]
    causal = torch.arange(logits.shape[-1], device=q.device) <= position
    weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    slope = grad.to(kind) @ v.to(kind).transpose(-1, -2)
    mean = (slope * weights).sum(-1, keepdim=True)
    effect = -weights * (slope - mean) / (1 - weights + _EPSILON)
    if offset == 0:
        effect[..., 0, 0] = -slope[..., 0, 0] * weights[..., 0, 0]
    return effect.masked_fill(~causal, 0)


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (-1, groups))


def profile_influence(
    model: nn.Module,
    batches: Mapping[int, Sequence[Batch]],
    block: int = 64,
    *,
    share_groups: bool = True,
) -> dict[int, Tensor]:
    """The influence of every block of attention on the loss of the answers, per length.

    Attention is recomputed layer by layer in the backward pass, some rows at a time.

    Args:
        model: a transformers model; left as it was found.
        batches: by length, (ids, weights) of samples padded at the right to that length. The
            answers should be the dense model's own.
        block: tokens per block.
        share_groups: key heads get the largest influence of their query heads; False keeps query
            heads apart.

    Returns:
        By length, (layers, heads, blocks, blocks) float32.

    Raises:
        ValueError: a length is no multiple of the block, or a batch has another length.
    """
    found = {}
    for length, samples in batches.items():
        if length % block or length < block:
            raise ValueError(f"length {length}: expected a multiple of block={block}")
        layers: dict[int, Tensor] = {}
        groups = [1]

        def note(layer: int, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> None:
            groups[0] = q.shape[1] // k.shape[1]  # noqa: B023
            part = influence(q, k, v, grad, scale=scale, block=block)
            layers[layer] = layers.get(layer, 0) + part  # noqa: B023

        for ids, weights in samples:
            if ids.shape[1] != length or weights.shape != ids.shape:
                raise ValueError(
                    f"batches[{length}]: ids {tuple(ids.shape)}, weights {tuple(weights.shape)}, "
                    f"expected (batch, {length}) both"
                )
            with _watched(model, note):
                answer_loss(model, (ids, weights)).backward()
            model.zero_grad(set_to_none=True)
        whole = torch.stack([layers[n] for n in sorted(layers)]) / len(samples)
        if share_groups and groups[0] > 1:
            whole = whole.unflatten(1, (-1, groups[0])).amax(2)
        found[length] = whole
    return found


@contextmanager
def _watched(model: nn.Module, note: Callable[..., None]) -> Iterator[None]:
    """The model with dense attention that hands q, k, v and its output's gradient to `note`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        scaling: float | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out = attend(q, k, v, causal=True, scale=scale, key_padding=mask)
        assert isinstance(out, Tensor)
        held = [t.detach() for t in (q, k, v)]
        with torch.no_grad():
            out.register_hook(lambda grad: note(module.layer_idx, *held, grad, scale))
        return out.transpose(1, 2), None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, padding_mask)
    kept: Any = model
    before = kept.config._attn_implementation
    kept.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        kept.set_attn_implementation(before)


def rule_mask(rule: ElasticSpan, length: int, block: int, sink: int) -> Tensor:
    """(blocks, blocks) bool: what a rule's cache keeps of a prompt, first blocks and a band.

    The first blocks are part of the span, as in the authors' cache; their own search adds them to
    it, and so foresees a block more than the cache then keeps.
    """
    blocks, kept = -(-length // block), rule.cache_tokens(length, block) // block
    window = kept - min(kept, sink // block)
    i, j = torch.arange(blocks)[:, None], torch.arange(blocks)
    return ((i - j).abs() < window) | (j < sink // block)


class SpanSearch:
    """Span rules for every head, within a mean density at every length.

    Args:
        influence: by length, (layers, heads, blocks, blocks), from `profile_influence`.
        extend_lengths: longer lengths at which the budget must hold too.
        density: largest mean share of the keys kept.
        lower: least share of that budget to use.
        rules_per_layer: different rules in a layer.
        intervals: parts of each objective's range in the search of the Pareto set.
        alpha_step: grid of alpha, tokens; from minus the shortest to the longest profile.
        betas: grid of beta.
        block: tokens per block of the profile.
        sink: first tokens that every head keeps.
        normalize: divide each head's influence by its sum ("head"), or each layer's ("layer").
        time_limit: seconds for each integer program.

    Raises:
        ValueError: no rule is valid, or the profile's shapes do not agree.

    Reference:
        Fu et al., arXiv 2406.14909.
    """

    def __init__(
        self,
        influence: Mapping[int, Tensor],
        extend_lengths: Sequence[int] = (),
        density: float = 0.5,
        lower: float = 0.9,
        rules_per_layer: int = 2,
        intervals: int = 4,
        alpha_step: int = 1024,
        betas: Sequence[float] = _BETAS,
        block: int = 64,
        sink: int = 64,
        normalize: str | None = None,
        time_limit: float = 60.0,
    ) -> None:
        if not 0 < density <= 1 or not 0 <= lower <= 1:
            raise ValueError(f"density={density}, lower={lower}: expected shares")
        if normalize not in (None, "head", "layer"):
            raise ValueError(f"normalize={normalize!r}: expected None, 'head' or 'layer'")
        heads = {tuple(t.shape[:2]) for t in influence.values()}
        if len(heads) != 1:
            raise ValueError(f"influence: layers and heads {sorted(heads)}, expected one shape")
        for length, t in influence.items():
            if t.shape[2] * block != length:
                raise ValueError(
                    f"influence[{length}]: {t.shape[2]} blocks of {block}, expected them to be "
                    "the length"
                )
        self.layers, self.heads = heads.pop()
        self.lengths = sorted(influence)
        self.all_lengths = sorted({*self.lengths, *extend_lengths})
        self.influence = {n: _normalized(influence[n].double(), normalize) for n in self.lengths}
        self.density, self.lower, self.intervals = density, lower, intervals
        self.rules_per_layer, self.block, self.sink = rules_per_layer, block, sink
        self.time_limit = time_limit
        self.rules = self._rules(alpha_step, betas)

    def _rules(self, step: int, betas: Sequence[float]) -> list[ElasticSpan]:
        """The valid rules of the grid, by their span at the largest length."""
        shortest, longest, largest = self.lengths[0], self.lengths[-1], self.all_lengths[-1]
        found: dict[tuple[int, ...], ElasticSpan] = {}
        for alpha in range(-shortest, longest + 1, step):
            for beta in betas:
                rule = ElasticSpan(alpha, beta)
                fits = all(rule.tokens(n) <= n for n in (longest, largest))
                if fits and rule.tokens(shortest) > 0:
                    sizes = tuple(rule.cache_tokens(n, self.block) for n in self.all_lengths)
                    found.setdefault(sizes, rule)
        if not found:
            raise ValueError(f"alpha_step={step}: no rule is valid at {self.all_lengths}")
        return sorted(found.values(), key=lambda rule: (rule.tokens(largest), rule.beta))

    def losses(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(lengths, layers * heads, rules): the influence outside each rule's mask."""
        parts = []
        for length in self.lengths:
            outside = torch.stack(
                [~rule_mask(rule, length, self.block, self.sink) for rule in self.rules]
            )
            flat = self.influence[length].flatten(2).cpu()
            parts.append((flat @ outside.flatten(1).double().T).flatten(0, 1))
        return torch.stack(parts).numpy()

    def costs(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(all lengths, rules): keys kept, as a share of the length."""
        return np.array(
            [
                [min(1.0, rule.cache_tokens(n, self.block) / n) for rule in self.rules]
                for n in self.all_lengths
            ]
        )

    def run(self) -> list[MoAPlan]:
        """The Pareto set of plans over the profile lengths.

        Raises:
            ValueError: no plan is within the budget; the message names the smallest one.
        """
        program = SpanProgram(
            self.losses(),
            self.costs(),
            np.repeat(np.arange(self.layers), self.heads),
            self.density,
            self.lower,
            self.rules_per_layer,
            self.time_limit,
        )
        choices = program.front(self.intervals)
        if not choices:
            least = program.costs.max(0).min()
            raise ValueError(
                f"density={self.density}: no plan between {self.lower:g} of it and itself at "
                f"lengths {self.all_lengths}; the smallest density is {least:.3f}"
            )
        values = [
            [program.value(n, choice) for n in range(len(self.lengths))] for choice in choices
        ]
        return [self._plan(choices[n]) for n in pareto_front(values)]

    def _plan(self, choice: Any) -> MoAPlan:
        rules = [self.rules[int(n)] for n in choice]
        rows = [rules[n : n + self.heads] for n in range(0, len(rules), self.heads)]
        return MoAPlan.of(rows, self.block, self.sink)


def _normalized(influence: Tensor, how: str | None) -> Tensor:
    if how is None:
        return influence
    over = (2, 3) if how == "head" else (1, 2, 3)
    return influence / influence.sum(over, keepdim=True).clamp(min=1e-30)


@torch.no_grad()
def validate(
    model: nn.Module, plans: Sequence[MoAPlan], batches: Sequence[Batch], max_new: int = 0
) -> tuple[MoAPlan, list[float]]:
    """The plan of least loss on answers, at a length that the profile has not seen.

    Args:
        model: a transformers model; left as it was found.
        plans: what to choose from.
        batches: (ids, weights) of held-out samples.
        max_new: see `MoASelector`.

    Returns:
        The best plan, and the mean loss of each in nats.

    Raises:
        ValueError: no plan or no batch.
    """
    if not plans or not batches:
        raise ValueError(f"{len(plans)} plans, {len(batches)} batches: expected some of both")
    table = []
    for plan in plans:
        attach(model, MoASelector(plan, max_new))
        try:
            losses = [float(answer_loss(model, batch)) for batch in batches]
        finally:
            detach(model)
        table.append(sum(losses) / len(losses))
    return plans[int(np.argmin(table))], table
