"""How sparse at which step."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.sparsity import (
    NM,
    Constant,
    Cosine,
    CosineFloor,
    Cubic,
    Exponential,
    FixedFraction,
    Geometric,
    InversePower,
    Linear,
    NMLadder,
    OneShot,
    Schedule,
)

QUICK = settings(max_examples=80, deadline=None)
fraction = st.floats(0, 0.999)


@QUICK
@given(
    fraction,
    fraction,
    st.integers(0, 50),
    st.integers(1, 20),
    st.integers(1, 20),
    st.floats(0.5, 5),
)
def test_cubic_has_exact_ends_and_is_monotone(s_i, s_f, begin, n, every, power):
    schedule = Cubic(s_i, s_f, begin, n, every, power)
    values = [schedule.value(t) for t in range(begin, begin + n * every + 3)]
    assert values[0] == s_i
    assert values[n * every :] == [s_f] * 3
    rising = sorted(values) if s_f >= s_i else sorted(values, reverse=True)
    assert values == rising


@QUICK
@given(fraction, fraction, st.integers(0, 50), st.integers(1, 20), st.integers(1, 20))
def test_cubic_equals_polynomial_decay_of_tfmot(s_i, s_f, begin, n, every):
    schedule = Cubic(s_i, s_f, begin, n, every)
    end = begin + n * every
    for t in range(begin, end + 1):
        p = min(1.0, max(0.0, (t - begin) / (end - begin)))
        assert schedule.value(t) == pytest.approx((s_i - s_f) * (1 - p) ** 3 + s_f, abs=1e-7)


def test_cubic_is_due_on_its_grid_and_never_after():
    schedule = Cubic(0, 0.9, begin=10, n=3, every=5)
    assert [t for t in range(100) if schedule.due(t)] == [10, 15, 20, 25]


def test_one_shot_and_constant():
    once = OneShot(7, 0.5)
    assert [once.value(t) for t in (6, 7, 99)] == [0.0, 0.5, 0.5]
    assert [t for t in range(20) if once.due(t)] == [7]
    steady = Constant(0.5, every=3, begin=2, end=9)
    assert [t for t in range(20) if steady.due(t)] == [2, 5, 8]


@QUICK
@given(st.floats(0.01, 0.99), st.integers(1, 30))
def test_geometric_prunes_equal_fractions_and_ends_exactly(s_f, rounds):
    schedule = Geometric(s_f, rounds)
    assert schedule.value(0) == 0.0
    assert schedule.value(rounds) == s_f
    for r in range(rounds):
        alive = 1 - schedule.value(r)
        assert 1 - schedule.value(r + 1) == pytest.approx(alive * (1 - schedule.fraction))


def test_fixed_fraction_is_the_lottery_tickets_recurrence():
    schedule = FixedFraction(0.2)
    assert schedule.value(3) == pytest.approx(1 - 0.8**3)
    assert not schedule.due(0)


@pytest.mark.parametrize(
    ("ladder", "patterns"),
    [
        (NMLadder(1, 8, "stepwise", 0, 40), ["7:8", "4:8", "2:8", "1:8"]),
        (NMLadder(2, 8, "stepwise", 0, 40), ["7:8", "4:8", "2:8"]),
        (NMLadder(4, 4, "stepwise", 0, 40), ["4:4"]),
        (NMLadder(2, 4, "geometric", 0, 40), ["16:32", "8:16", "4:8", "2:4"]),
        (NMLadder(1, 4, "densify", 0, 40), ["1:32", "1:16", "1:8", "1:4"]),
        (NMLadder(2, 4, "geometric", 0, 40, axis_length=24), ["4:8", "2:4"]),
        (NMLadder(1, 2, {5: (3, 4), 20: (1, 2)}), ["3:4", "1:2"]),
    ],
)
def test_ladders_have_the_rungs_of_their_kind(ladder, patterns):
    assert [p.spec for p in ladder.patterns] == patterns


def test_a_rung_applies_until_the_next_begins():
    ladder = NMLadder(1, 8, "stepwise", begin=10, end=50)
    assert ladder.rungs == (10, 20, 30, 40)
    assert ladder.pattern(9) is None
    assert [ladder.pattern(t) for t in (10, 19, 20, 999)] == [
        NM(7, 8),
        NM(7, 8),
        NM(4, 8),
        NM(1, 8),
    ]
    assert [t for t in range(99) if ladder.due(t)] == [10, 20, 30, 40]
    assert ladder.value(999) == 1 - 1 / 8


def test_cosine_has_its_ends_and_is_zero_outside():
    schedule = Cosine(0.3, 10, 110, every=20)
    assert schedule.value(10) == pytest.approx(0.3)
    assert schedule.value(110) == pytest.approx(0.0)
    assert schedule.value(9) == schedule.value(111) == 0.0
    assert [t for t in range(200) if schedule.due(t)] == [30, 50, 70, 90]


def test_scalars_follow_their_formulas():
    floor = CosineFloor(0.5, 100, every=25)
    assert floor.value(0) == pytest.approx(0.5)
    assert floor.value(100) == pytest.approx(0.005)
    assert [t for t in range(101) if floor.due(t)] == [25, 50, 75, 100]
    assert [Linear(0.25, begin=2).value(t) for t in (0, 2, 4, 9)] == [1.0, 1.0, 0.5, 0.0]
    assert Exponential(0.5, begin=2).value(4) == pytest.approx(math.exp(-1))
    assert Exponential(0.5, begin=2).value(1) == 1.0
    assert InversePower(0.5, 3, 10).value(5) == pytest.approx(0.5 * 0.5**3)


def test_all_are_schedules():
    for schedule in (OneShot(0, 0.5), Cubic(0, 0.5, 0, 1, 1), Cosine(0.3, 0, 9), NMLadder(1, 2)):
        assert isinstance(schedule, Schedule)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OneShot(-1, 0.5),
        lambda: OneShot(0, 1.5),
        lambda: Constant(0.5, every=0),
        lambda: Constant(0.5, begin=5, end=4),
        lambda: Cubic(0, 0.5, 0, 0, 1),
        lambda: Cubic(0, 0.5, 0, 1, 0),
        lambda: Cubic(0, 0.5, 0, 1, 1, power=0),
        lambda: Geometric(1.0, 3),
        lambda: Geometric(0.5, 0),
        lambda: FixedFraction(1.0),
        lambda: NMLadder(3, 8),
        lambda: NMLadder(1, 8, "sideways"),
        lambda: NMLadder(1, 8, "stepwise", 9, 3),
        lambda: NMLadder(1, 8, {}),
        lambda: Cosine(0.3, 9, 3),
        lambda: CosineFloor(0.5, 0),
        lambda: Linear(0),
        lambda: Exponential(-1),
        lambda: InversePower(0.5, 1, 0),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(ValueError, match=r"."):
        make()
