"""Input statistics of layers, streamed over calibration data (P12).

Two ways to walk a model:

- all at once: one pass over the data, every selected layer as it is now;
- block by block (`sequential_stages`): the statistics of block b see blocks < b as they are
  *after* pruning and block b dense; then block b's outputs are recomputed as inputs of b + 1.
  Only the hidden states at one block boundary are ever stored, so a model far larger than its
  activations fits.

The statistics themselves (what a "sample" and a "token" is, how convolutions are unfolded) are in
`InputStats`.

Reference: Frantar & Alistarh, SparseGPT, arXiv 2301.00774; Sun et al., Wanda, arXiv 2306.11695;
Zhang et al., DSnoT, arXiv 2310.08915.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.sparsity.blocks import (
    BlockCall,
    ForwardFn,
    calibrating,
    configs,
    find_blocks,
    first_tensor,
    record_block_calls,
    record_first_call,
    run_batch,
    same_arguments,
    stopping_at,
)
from aerogel.sparsity.input_stats import STATS, InputStats
from aerogel.sparsity.select import ParamRef

TokenMask = str | Callable[[Any], Tensor | None] | None


@dataclass
class Stage:
    """One step of a sequential walk: the layers to prune now and their statistics.

    Attributes:
        name: the block's name in the model, "" for the layers outside all blocks.
        index: position of this stage, from 0.
        total: number of stages.
        stats: selection name -> finished `InputStats`.
    """

    name: str
    index: int
    total: int
    stats: dict[str, InputStats] = field(default_factory=dict)


def collect_input_stats(
    model: nn.Module,
    batches: Iterable[Any],
    selection: Mapping[str, ParamRef],
    stats: Collection[str] = STATS,
    sequential: bool = True,
    *,
    prune: Callable[[Stage], None] | None = None,
    blocks: str | None = None,
    token_mask: TokenMask = "attention_mask",
    forward: ForwardFn = run_batch,
) -> dict[str, InputStats]:
    """Statistics of the inputs of every selected layer.

    Args:
        model: any module; runs in eval mode without gradients.
        batches: calibration batches as `run_batch` takes them.
        selection: the layers, as `select_parameters` returns them.
        stats: which of `STATS` to collect.
        sequential: walk block by block; without `prune` the values equal those of a single pass,
            so the walk is only made where something can change in between.
        prune: called after each stage to prune the layers it lists.
        blocks: name of the block list, None to find it.
        token_mask: which tokens count: a key of mapping batches ("attention_mask"), a function
            batch -> (batch, tokens) bool or None, or None for all.
        forward: how to run one batch.

    Returns:
        selection name -> `InputStats`.

    Raises:
        ValueError: no batch, a layer that never ran, NaN or infinite inputs, an unknown statistic,
            or `prune` with `sequential=True` on a model without a block list.

    Reference: arXiv 2301.00774, section 3; arXiv 2310.08915, section 3.
    """
    if prune is None:
        layers = _layers(selection)
        return _single_pass(model, batches, layers, stats, token_mask, forward)
    if not sequential:
        layers = _layers(selection)
        found = _single_pass(model, batches, layers, stats, token_mask, forward)
        prune(Stage("", 0, 1, found))
        return found
    result: dict[str, InputStats] = {}
    walk = sequential_stages(
        model, batches, selection, stats, blocks=blocks, token_mask=token_mask, forward=forward
    )
    for stage in walk:
        prune(stage)
        result.update(stage.stats)
    return {name: result[name] for name in selection}


def sequential_stages(
    model: nn.Module,
    batches: Iterable[Any],
    selection: Mapping[str, ParamRef],
    stats: Collection[str] = STATS,
    *,
    blocks: str | None = None,
    token_mask: TokenMask = "attention_mask",
    forward: ForwardFn = run_batch,
    offload: bool = False,
) -> Iterator[Stage]:
    """Walk a model block by block, yielding statistics; prune the stage before asking for the next.

    Layers that run ahead of the first block come first, then the blocks, then what runs behind
    them (seeing all blocks pruned). Block arguments other than the hidden states (attention
    masks, rotary embeddings, ...) are recorded per block from one dense forward pass and replayed.

    Args:
        model: any module whose blocks form a chain (each takes the previous one's output).
        batches: calibration batches; kept in memory (inputs only, not activations).
        selection: the layers, as `select_parameters` returns them.
        stats: which of `STATS` to collect.
        blocks: name of the block list, None to find it.
        token_mask: as in `collect_input_stats`.
        forward: how to run one batch.
        offload: keep the hidden states of the boundary on the CPU.

    Yields:
        `Stage`s; stages without selected layers are skipped (but still executed).

    Raises:
        ValueError: as `collect_input_stats`; also if the blocks are not a chain, or a sequence is
            longer than the model's context.
    """
    held = list(batches)
    if not held:
        raise ValueError("batches is empty; calibration needs at least one batch")
    _check_context(model, held)
    root, chain = find_blocks(model, blocks)
    layers = _layers(selection)
    inside = [_inside(layers, block) for block in chain]
    owned = {name for part in inside for name in part}
    outside = {name: module for name, module in layers.items() if name not in owned}
    before = _running_before(model, held[0], outside, chain[0], forward) if outside else {}
    after = {name: module for name, module in outside.items() if name not in before}
    total = bool(before) + sum(map(bool, inside)) + bool(after)
    index = 0
    with calibrating(model):
        if before:
            # A model that cannot be walked is refused before the caller prunes anything.
            record_block_calls(model, chain, held[0], forward)
            found = _single_pass(model, held, before, stats, token_mask, forward, until=chain[0])
            yield Stage("", index, total, found)
            index += 1
        boundary = _Boundary(model, chain, held, forward, token_mask, offload)
        for b, part in enumerate(inside):
            if part:
                found = boundary.collect(b, part, stats)
                yield Stage(f"{root}.{b}" if root else str(b), index, total, found)
                index += 1
            boundary.advance(b)
        del boundary
        if after:
            found = _single_pass(model, held, after, stats, token_mask, forward)
            yield Stage("", index, total, found)


class _Boundary:
    """Hidden states at one block boundary, for every batch, and how to run a block on them."""

    def __init__(
        self,
        model: nn.Module,
        chain: list[nn.Module],
        batches: list[Any],
        forward: ForwardFn,
        token_mask: TokenMask,
        offload: bool,
    ) -> None:
        self.chain = chain
        self.offload = offload
        self.masks = [_mask_of(batch, token_mask) for batch in batches]
        self.hidden: list[Tensor] = []
        self.calls: list[list[BlockCall]] = []
        for batch in batches:
            if self.calls and same_arguments(self.calls[0]):
                hidden, calls = record_first_call(model, chain, batch, forward)
            else:
                hidden, calls = record_block_calls(model, chain, batch, forward)
            self.hidden.append(hidden.cpu() if offload else hidden)
            self.calls.append(calls)

    def collect(
        self, b: int, layers: Mapping[str, nn.Module], stats: Collection[str]
    ) -> dict[str, InputStats]:
        collectors = {name: InputStats(module, name, stats) for name, module in layers.items()}
        for i, hidden in enumerate(self.hidden):
            with _listening(layers, collectors, hidden.shape[0], self.masks[i]), torch.no_grad():
                self._run(b, i)
        return {name: collector.finish() for name, collector in collectors.items()}

    def advance(self, b: int) -> None:
        """Replace the hidden states by the outputs of block b as it is now."""
        for i in range(len(self.hidden)):
            with torch.no_grad():
                out = first_tensor(self._run(b, i))
            assert out is not None
            self.hidden[i] = out.cpu() if self.offload else out
            self.calls[i][b] = BlockCall((), {}, None)  # masks of a finished block are not needed

    def _run(self, b: int, i: int) -> Any:
        call, hidden = self.calls[i][b], self.hidden[i]
        if self.offload:
            place = next((p.device for p in self.chain[b].parameters()), hidden.device)
            hidden = hidden.to(place)
        args, kwargs = call.with_hidden(hidden)
        return self.chain[b](*args, **kwargs)


def _layers(selection: Mapping[str, ParamRef]) -> dict[str, nn.Module]:
    if not selection:
        raise ValueError("selection is empty; nothing to calibrate")
    layers: dict[str, nn.Module] = {}
    for name, ref in selection.items():
        weight, module = ref.parameter, ref.module
        if weight.is_meta or not weight.is_floating_point():
            raise ValueError(
                f"{name}: a {'meta' if weight.is_meta else weight.dtype} weight cannot be "
                "calibrated; load or dequantise it first"
            )
        layers[name] = module
    return layers


def _inside(layers: Mapping[str, nn.Module], block: nn.Module) -> dict[str, nn.Module]:
    members = {id(module) for module in block.modules()}
    return {name: module for name, module in layers.items() if id(module) in members}


def _running_before(
    model: nn.Module,
    batch: Any,
    layers: Mapping[str, nn.Module],
    first_block: nn.Module,
    forward: ForwardFn,
) -> dict[str, nn.Module]:
    """Those layers that run ahead of the first block."""
    seen: dict[str, nn.Module] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            seen[name] = module

        return hook

    handles = [module.register_forward_pre_hook(note(n)) for n, module in layers.items()]
    try:
        with calibrating(model), torch.no_grad(), stopping_at(first_block):
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: layers[name] for name in layers if name in seen}


def _single_pass(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    stats: Collection[str],
    token_mask: TokenMask,
    forward: ForwardFn,
    until: nn.Module | None = None,
) -> dict[str, InputStats]:
    collectors = {name: InputStats(module, name, stats) for name, module in layers.items()}
    count = 0
    with calibrating(model), torch.no_grad():
        for batch in batches:
            count += 1
            _check_context(model, [batch])
            mask, size = _mask_of(batch, token_mask), _batch_size(batch)
            with _listening(layers, collectors, size, mask), stopping_at(until):
                forward(model, batch)
    if count == 0:
        raise ValueError("batches is empty; calibration needs at least one batch")
    return {name: collector.finish() for name, collector in collectors.items()}


@contextmanager
def _listening(
    layers: Mapping[str, nn.Module],
    collectors: Mapping[str, InputStats],
    batch_size: int | None,
    token_mask: Tensor | None,
) -> Iterator[None]:
    def hook_for(collector: InputStats) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not isinstance(x, Tensor):
                raise ValueError(f"{collector.name}: called without a tensor input")
            collector.update(x, batch_size=batch_size, token_mask=token_mask)

        return hook

    handles = [
        module.register_forward_pre_hook(hook_for(collectors[name]), with_kwargs=True)
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask_of(batch: Any, token_mask: TokenMask) -> Tensor | None:
    if token_mask is None:
        return None
    if not isinstance(token_mask, str) and not callable(token_mask):
        raise TypeError(f"token_mask must be a key, a function or None, got {token_mask!r}")
    if callable(token_mask):
        mask = token_mask(batch)
    else:
        mask = batch.get(token_mask) if isinstance(batch, Mapping) else None
    if mask is None or mask.ndim != 2:
        return None  # a ready-made 4-d attention mask does not say which tokens are padding
    return mask.bool()


def _batch_size(batch: Any) -> int | None:
    tensor = first_tensor(batch)
    return tensor.shape[0] if tensor is not None and tensor.ndim > 0 else None


def _check_context(model: nn.Module, batches: list[Any]) -> None:
    limits = [getattr(config, "max_position_embeddings", None) for config in configs(model)]
    limit = min((n for n in limits if isinstance(n, int)), default=None)
    for batch in batches:
        tokens = _token_ids(batch)
        if limit is not None and tokens is not None and tokens.shape[-1] > limit:
            raise ValueError(
                f"calibration sequence of {tokens.shape[-1]} tokens exceeds the model's context of "
                f"{limit} (max_position_embeddings)"
            )


def _token_ids(batch: Any) -> Tensor | None:
    """The integer tensor that a language model's batch is, or holds; None in any other batch."""
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids")
    elif isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    is_ids = isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point()
    return batch if is_ids else None
