"""MInference's search for patterns, as the calibration of its selector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from aerogel.attention.calibration import OnProgress, add_calibration
from aerogel.attention.minference import MInferenceSelector
from aerogel.attention.pattern_file import HeadPattern
from aerogel.attention.pattern_search import CANDIDATES, Metric, search_patterns


@add_calibration("minference")
def calibrate_patterns(
    model: nn.Module,
    windows: Tensor,
    *,
    on_progress: OnProgress | None = None,
    candidates: Sequence[Sequence[Any]] = CANDIDATES,
    budget: float | None = None,
    metric: Metric = "output_l2",
    **options: Any,
) -> MInferenceSelector:
    """Finds the pattern of every head on all windows joined to one sample.

    Args:
        model: a transformers model.
        windows: (windows, length) token ids.
        on_progress: called at the beginning and at the end.
        candidates: (kind, size, size) of each pattern that is tried.
        budget: as for `search_patterns`.
        metric: the same.
        options: of `MInferenceSelector`, in the search and after it.

    Raises:
        ValueError: as `search_patterns`.
    """
    if on_progress is not None:
        on_progress(0, 1)
    patterns = [HeadPattern(*candidate) for candidate in candidates]
    sample = windows.reshape(1, -1)
    config = search_patterns(model, sample, patterns, budget=budget, metric=metric, **options)
    if on_progress is not None:
        on_progress(1, 1)
    return MInferenceSelector(config, **options)
