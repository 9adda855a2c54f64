import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.sparsity.retraining import (
    ALLR,
    CLR,
    FT,
    LLR,
    LRW,
    SLR,
    RetrainingLR,
    learning_rate_curve,
    norm_drop,
    retraining_curve,
)

ORIGINAL = [0.1] * 40 + [0.01] * 40 + [0.001] * 20


def test_each_curve_follows_its_definition():
    assert FT(ORIGINAL, 10).value(3) == 0.001
    rewound = LRW(ORIGINAL, 30)
    assert [rewound.value(t) for t in range(30)] == ORIGINAL[-30:]
    squeezed = SLR(ORIGINAL, 10)
    assert [squeezed.value(t) for t in range(10)] == [0.1] * 4 + [0.01] * 4 + [0.001] * 2
    cyclic = CLR(ORIGINAL, 100)
    assert cyclic.value(0) == 0.0
    assert cyclic.value(10) == pytest.approx(0.1)
    assert cyclic.value(55) == pytest.approx((0.1 + 0.001) / 2)
    assert cyclic.value(100) == pytest.approx(0.001)
    linear = LLR(ORIGINAL, 100)
    assert linear.value(0) == 0.0
    assert linear.value(5) == pytest.approx(0.05)
    assert linear.value(10) == pytest.approx(0.1)
    assert linear.value(55) == pytest.approx(0.05)
    assert linear.value(100) == 0.0


@settings(max_examples=50, deadline=None)
@given(drop=st.floats(0, 2), p=st.floats(0.01, 1), steps=st.integers(1, 300))
def test_adaptive_peak_stays_between_its_floor_and_the_maximum(drop, p, steps):
    curve = ALLR(ORIGINAL, steps, norm_drop=drop, pruned_fraction=p)
    low = 0.1 * min(steps / 100, 1)
    assert low - 1e-12 <= curve.peak <= 0.1 + 1e-12
    assert curve.peak == pytest.approx(min(max(0.1 * drop / math.sqrt(p), low), 0.1))


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(["FT", "LRW", "SLR", "CLR", "LLR"]), steps=st.integers(1, 100))
def test_no_curve_leaves_the_range_of_the_original(name, steps):
    curve = retraining_curve(name, ORIGINAL, steps)
    values = [curve.value(t) for t in range(steps + 5)]
    assert all(0 <= v <= 0.1 + 1e-12 for v in values)


def test_scheduler_drives_every_group_and_resumes():
    def start():
        a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([{"params": [a], "lr": 0.3}, {"params": [b], "lr": 0.03}])
        return optimizer, RetrainingLR(optimizer, LLR(ORIGINAL, 20))

    optimizer, scheduler = start()
    seen = []
    for t in range(20):
        seen.append([g["lr"] for g in optimizer.param_groups])
        assert seen[-1][0] == pytest.approx(LLR(ORIGINAL, 20).value(t))
        assert seen[-1][1] == pytest.approx(seen[-1][0] / 10)
        if t == 7:
            saved, saved_optimizer = scheduler.state_dict(), optimizer.state_dict()
        optimizer.step()
        scheduler.step()
    other, resumed = start()
    other.load_state_dict(saved_optimizer)
    resumed.load_state_dict(saved)
    for t in range(7, 20):
        assert [g["lr"] for g in other.param_groups] == seen[t]
        other.step()
        resumed.step()


def test_recorded_curve_is_the_schedule():
    curve = learning_rate_curve(
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [40, 80]), 0.1, 100
    )
    assert curve == pytest.approx(ORIGINAL)


def test_norm_drop_is_relative():
    before = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    after = {"a": torch.tensor([0.0, 4.0]), "b": torch.zeros(2)}
    assert norm_drop(before, after) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="zero"):
        norm_drop({"b": torch.zeros(2)}, {"b": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"^a: "):
        norm_drop({"a": torch.ones(2)}, {"a": torch.ones(3)})


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="nearest: LLR"):
        retraining_curve("LLRR", ORIGINAL, 10)
    with pytest.raises(ValueError, match="exceeds"):
        LRW(ORIGINAL, 101)
    for original in ([], [0.0], [-1.0], [math.inf]):
        with pytest.raises(ValueError, match="original"):
            FT(original, 10)
    with pytest.raises(ValueError, match="steps"):
        FT(ORIGINAL, 0)
    with pytest.raises(ValueError, match="pruned_fraction"):
        ALLR(ORIGINAL, 5, norm_drop=0.1, pruned_fraction=0.0)
    with pytest.raises(ValueError, match="norm_drop"):
        ALLR(ORIGINAL, 5, norm_drop=math.nan, pruned_fraction=0.5)
