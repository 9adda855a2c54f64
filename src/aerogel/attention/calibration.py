"""Calibration: one call for whatever a selector measures or learns on a model before it is used.

A method joins with a function that looks at running text and returns its selector; it may live in
any room (a search, a training), which registers it when imported:

    @add_calibration("my-selector")
    def calibrate_mine(model, windows, *, on_progress=None, threshold=0.1): ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from aerogel.attention.selector import SELECTORS, Selector, make_selector

OnProgress = Callable[[int, int], None]
"""Called as (steps done, steps in all)."""


class Calibration(Protocol):
    """What a method registers: a function of a model and text, with options of its own."""

    def __call__(
        self, model: nn.Module, windows: Tensor, *, on_progress: OnProgress | None, **options: Any
    ) -> Selector:
        """Measure or train.

        Args:
            model: a transformers model, in evaluation mode; left as it was found.
            windows: (windows, length) int64 token ids of running text.
            on_progress: progress of the work.
            options: the method's own.

        Returns:
            A selector that `save_selector` can write and `attach` can use.
        """


CALIBRATIONS: dict[str, Calibration] = {}
"""Every calibration by the slug of its selector."""

C = TypeVar("C", bound=Callable[..., Selector])


_NOT_OPTIONS = ("model", "windows", "on_progress")
_HANDED_TO: dict[str, tuple[Callable[..., Any], ...]] = {}


def add_calibration(slug: str, *handed_to: Callable[..., Any]) -> Callable[[C], C]:
    """Decorator: registers a selector's calibration.

    Args:
        slug: the selector's name.
        handed_to: what gets the options that the function does not name; default the selector.

    Raises:
        ValueError: the slug has one already.
    """

    def register(function: C) -> C:
        if slug in CALIBRATIONS:
            raise ValueError(f"slug={slug!r}: has a calibration already, {CALIBRATIONS[slug]}")
        CALIBRATIONS[slug] = function
        _HANDED_TO[slug] = handed_to
        return function

    return register


def calibrate(
    model: nn.Module,
    slug: str,
    windows: Tensor,
    *,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> Selector:
    """Calibrate a selector for a model.

    Args:
        model: a transformers model; its mode is restored afterwards.
        slug: the selector's name.
        windows: (windows, length) int64 token ids of running text, both at least 1.
        on_progress: called as (steps done, steps in all).
        options: of the method's calibration. A method without one is made from them as it is.

    Returns:
        The selector; `save_selector(selector, model, path)` keeps it.

    Raises:
        ValueError: no selector of this name, no tokens, or an option that it does not have.
    """
    if windows.ndim != 2 or not windows.numel():
        raise ValueError(f"windows has shape {tuple(windows.shape)}, expected (windows, length)")
    if slug not in CALIBRATIONS:
        if slug in SELECTORS and "calibration" in SELECTORS[slug].needs:
            raise ValueError(f"selector={slug!r}: its calibration is not registered")
        check_options(slug, options)
        return make_selector(slug, **options)
    function = CALIBRATIONS[slug]
    check_options(slug, options, function)
    was_training = model.training
    model.eval()
    try:
        return function(model, windows, on_progress=on_progress, **options)
    finally:
        model.train(was_training)


def check_options(slug: str, options: dict[str, Any], calibration: Any = None) -> None:
    """Raises ValueError if a selector, or its calibration, has no option of a given name.

    A calibration that takes any keywords hands them on: to its selector, or to what it says.
    """
    names: list[str] = []
    passes_on = calibration is None
    if calibration is not None:
        known = inspect.signature(calibration).parameters
        passes_on = any(p.kind is p.VAR_KEYWORD for p in known.values())
        names += [
            n for n, p in known.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    if passes_on:
        own = (SELECTORS[slug].factory,) if slug in SELECTORS else ()
        handed_to = () if calibration is None else _HANDED_TO.get(slug, ())
        for target in handed_to or own:
            known = inspect.signature(target).parameters
            names += [n for n, p in known.items() if p.kind is not p.VAR_KEYWORD]
    names = [n for n in dict.fromkeys(names) if n not in _NOT_OPTIONS]
    if unknown := sorted(options.keys() - set(names)):
        raise ValueError(
            f"{slug}: has no option {', '.join(unknown)}; expected some of {', '.join(names)}"
        )
