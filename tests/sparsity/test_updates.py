"""Drop and grow against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.sparsity import (
    Block,
    DropGrow,
    MaskSet,
    Rebuild,
    UpdateContext,
    drop,
    grow,
    select_parameters,
)

QUICK = settings(max_examples=60, deadline=None)
cases = st.tuples(st.integers(1, 30), st.integers(0, 999))


def random_case(numel, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(numel, generator=generator) < 0.5
    score = torch.randint(0, 4, (numel,), generator=generator).float()
    return mask, score


@QUICK
@given(cases, st.data())
def test_drop_removes_the_lowest_kept_entries(case, data):
    mask, score = random_case(*case)
    count = data.draw(st.integers(0, int(mask.sum())))
    after = drop(mask, score, count)
    kept = mask.nonzero().flatten().tolist()
    survivors = sorted(sorted(kept, key=lambda i: (-float(score[i]), i))[: len(kept) - count])
    assert after.nonzero().flatten().tolist() == survivors


@QUICK
@given(cases, st.integers(0, 30))
def test_grow_adds_the_highest_free_entries_and_reports(case, count):
    mask, score = random_case(*case)
    forbid = random_case(case[0], case[1] + 1)[0]
    after, added = grow(mask, score, count, forbid)
    free = (~mask & ~forbid).nonzero().flatten().tolist()
    expected = sorted(free, key=lambda i: (-float(score[i]), i))[:count]
    assert added == len(expected)
    assert (after & ~mask).nonzero().flatten().tolist() == sorted(expected)
    assert bool((after | ~mask).all())


def test_drop_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="count"):
        drop(torch.tensor([True, False]), torch.ones(2), 2)


def context(seed, density=0.5, value=0.3, target=None):
    torch.manual_seed(seed)
    model = nn.Linear(9, 7)
    selection = select_parameters(model)
    mask = torch.zeros(63, dtype=torch.bool)
    mask[torch.randperm(63)[: int(63 * density)]] = True
    masks = MaskSet({"weight": mask.view(7, 9)})
    nnz = masks.nnz if target is None else target
    return UpdateContext(
        t=5,
        value=value,
        selection=selection,
        masks=masks,
        weights={"weight": model.weight.detach() * masks["weight"]},
        gradients={"weight": torch.randn(7, 9)},
        generator=torch.Generator().manual_seed(seed),
        fired=masks.clone(),
        target={"weight": nnz},
    )


@QUICK
@given(
    st.integers(0, 99),
    st.floats(0, 1),
    st.sampled_from(["random", "random_unfired", "gradient"]),
    st.sampled_from(["magnitude", "set", "taylor"]),
    st.sampled_from(["floor", "ceil"]),
)
def test_drop_and_grow_preserve_the_count(seed, fraction, growth, death, rounding):
    ctx = context(seed, value=fraction)
    after = DropGrow(growth, death, rounding).update(ctx)
    assert after.nnz == ctx.masks.nnz


def test_rigl_drops_small_weights_and_grows_large_gradients():
    ctx = context(0)
    mask, weight = ctx.masks["weight"].flatten(), ctx.weights["weight"].flatten()
    gradient = ctx.gradients["weight"].flatten().abs()
    after = DropGrow("gradient").update(ctx)["weight"].flatten()
    count = int(0.3 * int(mask.sum()))
    kept = sorted(mask.nonzero().flatten().tolist(), key=lambda i: -abs(float(weight[i])))
    survivors = set(kept[: len(kept) - count])
    free = sorted(set(range(63)) - survivors, key=lambda i: -float(gradient[i]))
    assert set(after.nonzero().flatten().tolist()) == survivors | set(free[:count])


def test_a_random_start_is_repaired_to_its_target():
    for target in (20, 45):
        ctx = context(1, target=target)
        assert DropGrow("random").update(ctx).nnz == target


def test_forbidden_entries_are_not_grown_back():
    ctx = context(2, value=0.9)
    rule = DropGrow("random", forbid_dropped=True)
    after = rule.update(ctx)["weight"]
    survivors = after & ctx.masks["weight"]
    assert int(survivors.sum()) == ctx.masks.nnz - int(0.9 * ctx.masks.nnz)


def test_growth_without_room_says_so():
    ctx = context(3, density=0.9, value=0.5)
    with pytest.warns(UserWarning, match="free to grow"):
        after = DropGrow("random", forbid_dropped=True).update(ctx)
    assert after.nnz < ctx.masks.nnz


def test_unfired_entries_grow_first():
    ctx = context(4, density=0.2, value=0.5)
    ctx.fired["weight"] |= torch.arange(63).view(7, 9) >= 30
    after = DropGrow("random_unfired", forbid_dropped=True).update(ctx)["weight"]
    grown = after & ~ctx.masks["weight"]
    assert not bool((grown & ctx.fired["weight"]).any())


def test_set_drops_half_from_each_sign():
    ctx = context(5, density=1.0, value=0.2, target=0)
    ctx.target = {"weight": 63 - 12}
    after = DropGrow("random", "set", forbid_dropped=True).update(ctx)["weight"]
    gone = ctx.weights["weight"][~after]
    assert int((gone > 0).sum()) == int((gone < 0).sum()) == 6


@pytest.mark.parametrize(
    "make",
    [
        lambda: DropGrow("expected_error"),
        lambda: DropGrow("gradeint"),
        lambda: DropGrow(death="magnitud"),
        lambda: DropGrow(gradient_window=0),
        lambda: Rebuild(threshold_ema=1.0),
        lambda: Rebuild(threshold_ema=0.5, scope="global"),
    ],
)
def test_impossible_rules_are_refused(make):
    with pytest.raises(ValueError, match=r"."):
        make()


def test_smoothed_threshold_lags_and_arrives():
    rule = Rebuild(threshold_ema=0.9)
    ctx = context(6, density=1.0, value=0.5)
    first = rule.update(ctx).sparsity()
    for _ in range(80):
        last = rule.update(ctx).sparsity()
    assert first < 0.1
    assert last == pytest.approx(0.5, abs=2 / 63)
    other = Rebuild(threshold_ema=0.9)
    other.load_state_dict(rule.state_dict())
    assert other.update(ctx) == rule.update(ctx)


def test_rebuild_takes_patterns_that_change():
    rule = Rebuild(pattern=lambda t: None if t < 3 else Block(1, 3))
    ctx = context(7)
    ctx.t = 2
    assert rule.update(ctx).sparsity() == 0
    ctx.t = 3
    assert Block(1, 3).is_satisfied(rule.update(ctx)["weight"])
