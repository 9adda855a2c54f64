"""Arguments that are numbers or names: what each may be, checked and said in one way.

    check_count("rounds", rounds, 1)
    check_number("rate", rate, "(0, 1)")
    check_choice("scope", scope, ("layer", "global"))
    check_names("include", include)

All raise before anything is changed, name the argument, say what was expected and what was given.
"""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real


def check_count(argument: str, value: object, least: int = 1, most: int | None = None) -> None:
    """A whole number of at least ``least``, and of at most ``most`` if that is given.

    Raises:
        TypeError: no whole number (a bool and 1.5 are none).
        ValueError: out of range.
    """
    wanted = f"at least {least}" if most is None else f"in [{least}, {most}]"
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{argument} must be a whole number {_of(wanted)}, got {value!r}")
    if int(value) < least or (most is not None and int(value) > most):
        raise ValueError(f"{argument} must be {wanted}, got {value}")


def check_number(argument: str, value: object, interval: str = "(-inf, inf)") -> None:
    """A real number in an interval, e.g. ``"[0, 1)"``; NaN is in none, infinity only in ``inf]``.

    Raises:
        TypeError: no real number.
        ValueError: outside the interval.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{argument} must be a number in {interval}, got {value!r}")
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    number = float(value)
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"{argument} must be in {interval}, got {value}")


def check_choice(argument: str, value: object, known: Collection[object]) -> None:
    """One of some values, most often names.

    Raises:
        ValueError: another.
    """
    if not any(value == each for each in known):
        choices = ", ".join(repr(each) for each in known)
        raise ValueError(f"{argument} must be one of {choices}, got {value!r}")


def check_names(argument: str, value: object) -> None:
    """Several names or globs, not a lone string.

    Raises:
        TypeError: no collection of strings.
    """
    names = value if isinstance(value, Collection) and not isinstance(value, str) else [None]
    if not all(isinstance(each, str) for each in names):
        raise TypeError(f"{argument} must be a sequence of names or globs, got {value!r}")


def _of(wanted: str) -> str:
    return f"of {wanted}" if wanted.startswith("at") else wanted
