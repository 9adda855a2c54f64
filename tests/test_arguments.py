"""Numbers and names as arguments are checked, and refused, in one way."""

import math

import numpy as np
import pytest

from aerogel.arguments import check_choice, check_count, check_names, check_number


@pytest.mark.parametrize("value", [1, 7, np.int64(3)])
def test_whole_numbers_in_range_pass(value):
    check_count("steps", value, 1, 7)


@pytest.mark.parametrize("value", [1.0, 1.5, math.nan, math.inf, True, "3", None, [1]])
def test_other_things_are_no_whole_numbers(value):
    with pytest.raises(TypeError, match=r"steps must be a whole number of at least 1, got "):
        check_count("steps", value)


def test_whole_numbers_out_of_range_are_named():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        check_count("steps", 0)
    with pytest.raises(ValueError, match=r"steps must be in \[2, 4\], got 5"):
        check_count("steps", 5, 2, 4)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5, np.float32(0.25)), (-1e-9, 1.0, math.nan, math.inf)),
        ("(0, 1]", (1e-9, 1.0), (0.0, 1.1, -math.inf)),
        ("(0, inf)", (1e-9, 1e300), (0, math.inf, math.nan)),
        ("[0, inf]", (0, math.inf), (-1, math.nan)),
        ("(-inf, inf)", (-5, 0.0), (math.inf, math.nan)),
    ],
)
def test_numbers_are_held_to_their_interval(interval, inside, outside):
    for value in inside:
        check_number("rate", value, interval)
    for value in outside:
        with pytest.raises(ValueError, match=r"rate must be in .*, got "):
            check_number("rate", value, interval)
    for value in ("0.5", None, [0.5], True, 1j):
        with pytest.raises(TypeError, match="rate must be a number in "):
            check_number("rate", value, interval)


def test_names_and_choices():
    check_choice("scope", "layer", ("layer", "global"))
    with pytest.raises(ValueError, match="scope must be one of 'layer', 'global', got 3"):
        check_choice("scope", 3, ("layer", "global"))
    for names in ((), ["a", "b"], {"a": 1}):
        check_names("include", names)
    for names in ("a", 3, None, [3], ["a", None]):
        with pytest.raises(TypeError, match="include must be a sequence of names or globs, got"):
            check_names("include", names)
