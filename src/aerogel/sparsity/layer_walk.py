"""One step on every chosen layer, given the statistics of its input: one-shot pruning's loop.

    walk = LayerWalk(model, batches)
    chosen = walk.select(pattern=parse_pattern("2:4"))
    walk.each(chosen, ["sumsq"], prune)          # prune(ref, stats), block by block

Which layers (those inside the model's blocks), in which order and with whose statistics is decided
here once for all methods that prune a trained network without training it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.sparsity.blocks import (
    ForwardFn,
    calibrating,
    find_blocks,
    record_block_calls,
    run_batch,
)
from aerogel.sparsity.calibrate import Stage, TokenMask, collect_input_stats, sequential_stages
from aerogel.sparsity.input_stats import InputStats
from aerogel.sparsity.patterns import Pattern
from aerogel.sparsity.select import (
    WEIGHT_TYPES,
    ParamRef,
    ParamSelection,
    matches_glob,
    select_parameters,
)

ProgressFn = Callable[[int, int, str], None]

# A "dense" model with more zeros than this was probably pruned before.
ZERO_SHARE_WARNING = 0.05


class LayerWalk:
    """Runs a step on every chosen layer, block by block where the model has blocks.

    Args:
        model: any module.
        batches: calibration batches as `run_batch` takes them.
        sequential: walk block by block; None does so where the model has a chain of blocks.
        blocks: name of the block list, None to find it.
        token_mask: which tokens count, see `collect_input_stats`.
        forward: how to run one batch.
        on_progress: called as (layers done, layers in all, name) after each layer.

    Raises:
        ValueError: no batch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        sequential: bool | None = None,
        blocks: str | None = None,
        token_mask: TokenMask = "attention_mask",
        forward: ForwardFn = run_batch,
        on_progress: ProgressFn | None = None,
    ) -> None:
        self.model, self.blocks = model, blocks
        self.token_mask, self.forward, self.on_progress = token_mask, forward, on_progress
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches must be an iterable of batches, got {batches!r}")
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches is empty; calibration needs at least one batch")
        self._sequential = sequential

    @cached_property
    def sequential(self) -> bool:
        """Whether to go block by block; finding out runs the model, so `select` comes first."""
        if self._sequential is None and self.blocks is None:
            return self._is_chain()
        return self._sequential is not False

    def select(
        self,
        pattern: Pattern,
        selection: ParamSelection | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> ParamSelection:
        """The weights to prune: linear and convolution weights inside the blocks by default.

        Warns if more than 5 % of them are zero already: they are then no dense reference.

        Raises:
            ValueError: nothing chosen, a meta or integer weight, one that the pattern does not fit,
                or a sequential walk of a model without blocks.
        """
        chosen = selected_weights(self.model, selection, include, exclude)
        if selection is None and not include and self.sequential:
            _, chain = find_blocks(self.model, self.blocks)
            inside = {id(module) for part in chain for module in part.modules()}
            refs = [ref for ref in chosen.values() if id(ref.module) in inside]
            chosen = ParamSelection(refs) if refs else chosen
        for name, ref in chosen.items():
            pattern.validate(oriented_weight(ref).shape, name)
        zeros = sum(int((ref.parameter == 0).sum()) for ref in chosen.values())
        if zeros > ZERO_SHARE_WARNING * chosen.numel:
            share = 100 * zeros / chosen.numel
            warnings.warn(f"{share:.0f}% of the selected weights are zero already", stacklevel=3)
        return chosen

    def each(
        self,
        chosen: ParamSelection,
        stats: Collection[str],
        step: Callable[[ParamRef, InputStats], None],
    ) -> None:
        """Call ``step`` on every layer with its statistics, which later layers see done.

        Args:
            chosen: what `select` returned.
            stats: which of `input_stats.STATS` the step needs.
            step: changes the weight of one layer in place; runs without gradients.

        Raises:
            ValueError: as `sequential_stages`.
        """
        done = 0
        for stage in self._stages(chosen, stats):
            for name in list(stage.stats):
                with torch.no_grad():
                    step(chosen[name], stage.stats.pop(name))  # a Hessian is freed after its layer
                done += 1
                if self.on_progress is not None:
                    self.on_progress(done, len(chosen), name)

    def _stages(self, chosen: ParamSelection, stats: Collection[str]) -> Iterator[Stage]:
        if self.sequential:
            yield from sequential_stages(
                self.model,
                self.batches,
                chosen,
                stats,
                blocks=self.blocks,
                token_mask=self.token_mask,
                forward=self.forward,
            )
            return
        found = collect_input_stats(
            self.model,
            self.batches,
            chosen,
            stats,
            token_mask=self.token_mask,
            forward=self.forward,
        )
        yield Stage("", 0, 1, found)

    def _is_chain(self) -> bool:
        try:
            _, chain = find_blocks(self.model)
            with calibrating(self.model):
                record_block_calls(self.model, chain, self.batches[0], self.forward)
        except ValueError:
            return False
        return True


def selected_weights(
    model: nn.Module,
    selection: ParamSelection | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> ParamSelection:
    """Linear and convolution weights by name, transposed ones of transformers included.

    Raises:
        ValueError: nothing chosen, a layer whose weight is not floating-point, or both a selection
            and globs.
    """
    if selection is not None:
        if include or exclude:
            raise ValueError("give selection or include/exclude, not both")
        return selection
    odd = {type(module) for module in model.modules() if is_transposed(module)}
    types = (*WEIGHT_TYPES, *odd)
    for path, module in model.named_modules():
        # A selection holds floating-point weights only; leaving these out in silence would prune
        # half a model.
        name = f"{path}.weight" if path else "weight"
        if not include and isinstance(module, types) and not matches_glob(name, exclude):
            _check_weight(name, module.weight)
    return select_parameters(model, types, include, exclude)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weight as (in, out): `transformers.pytorch_utils.Conv1D`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def oriented_weight(ref: ParamRef) -> Tensor:
    """The stored weight as (out, in, *kernel), detached.

    Raises:
        ValueError: a meta or integer weight.
    """
    weight = ref.parameter.detach()
    _check_weight(ref.name, weight)
    return weight.t() if is_transposed(ref.module) else weight


def _check_weight(name: str, weight: object) -> None:
    assert isinstance(weight, Tensor)
    if weight.is_meta or not weight.is_floating_point():
        kind = "meta" if weight.is_meta else str(weight.dtype)
        raise ValueError(f"{name}: a {kind} weight cannot be pruned; load or dequantise it first")


def as_stored(ref: ParamRef, oriented: Tensor) -> Tensor:
    """A tensor of `oriented_weight`'s shape, turned back to how the module keeps it."""
    return oriented.t().contiguous() if is_transposed(ref.module) else oriented
