"""MoA's search for spans, as the calibration of its selector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aerogel.attention.calibration import OnProgress, add_calibration
from aerogel.attention.moa import MoASelector
from aerogel.data import recall
from aerogel.search.attention_spans import Batch, SpanSearch, profile_influence, validate

_RECOGNISED = 4  # first tokens of a repetition, which nothing foretells
_PASSAGE = (32, 128)  # tokens that repeat, at most a quarter of the window


@add_calibration("moa")
def calibrate_spans(
    model: nn.Module,
    windows: Tensor,
    *,
    on_progress: OnProgress | None = None,
    density: float = 0.5,
    block: int = 64,
    sink: int | None = None,
    extend_lengths: Sequence[int] | None = None,
    max_new: int = 1024,
    rules_per_layer: int = 2,
    seed: int = 0,
) -> MoASelector:
    """Profiles half of the windows, searches, and picks the plan on the other half.

    The end of every window becomes a repetition of an earlier passage of its own, and the loss on
    it is what spans are judged by: text alone hardly depends on far tokens. The profile's lengths
    are half and all of a window; plans are compared at three quarters.

    Args:
        model: a transformers model.
        windows: (windows >= 2, length) token ids, the length a multiple of four blocks.
        on_progress: called after each of the profile's passes and at the end.
        density: largest mean share of the keys kept.
        block: tokens per block.
        sink: first tokens that every head keeps; default one block.
        extend_lengths: longer lengths at which the budget must hold too; default twice a window.
        max_new: of `MoASelector`.
        rules_per_layer: see `SpanSearch`.
        seed: draws the passages.

    Raises:
        ValueError: too few windows, a length that does not fit, or no plan within the budget.
    """
    count, length = windows.shape
    if count < 2 or length % (4 * block):
        raise ValueError(
            f"windows: {count} of {length} tokens, expected two or more, of a multiple of 4 blocks "
            f"of {block}"
        )
    sink = block if sink is None else sink
    half = count // 2
    lengths = (length // 2, length)
    batches = {n: _answers(windows[:half, :n], seed) for n in lengths}
    profile: dict[int, Tensor] = {}
    for done, n in enumerate(lengths):
        if on_progress is not None:
            on_progress(done, 3)
        profile |= profile_influence(model, {n: batches[n]}, block)
    if on_progress is not None:
        on_progress(2, 3)
    further = (2 * length,) if extend_lengths is None else tuple(extend_lengths)
    search = SpanSearch(
        profile, further, density, rules_per_layer=rules_per_layer, alpha_step=_step(length, block),
        block=block, sink=sink,
    )  # fmt: skip
    held_out = _answers(windows[half:, : length * 3 // 4], seed + 1)
    plan, _ = validate(model, search.run(), held_out)
    if on_progress is not None:
        on_progress(3, 3)
    return MoASelector(plan, max_new)


def _step(length: int, block: int) -> int:
    """Grid of alpha: an eighth of the longest profile, in whole blocks; at most the paper's."""
    return min(1024, max(block, length // 8 // block * block))


def _answers(windows: Tensor, seed: int) -> list[Batch]:
    """One batch per window: its ids, and weight 1 on the repetition but its first tokens."""
    draw = torch.Generator().manual_seed(seed)
    least, most = (min(n, windows.shape[1] // 4) for n in _PASSAGE)
    ids, repeated = recall.repeat_passage(windows.cpu(), (least, most), draw)
    settled = repeated & repeated.roll(_RECOGNISED, 1)
    parts = zip(ids.to(windows.device).split(1), settled.float().split(1), strict=True)
    return [(row, weights.to(windows.device)) for row, weights in parts]
