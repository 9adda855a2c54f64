"""Exact counts, for every rounding, with ties."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.kernels import kth_largest
from aerogel.sparsity.topk import (
    kept_count,
    pruned_count,
    require_finite,
    topk_mask,
    topk_rows,
)

QUICK = settings(max_examples=60, deadline=None)

# Few distinct values, so that ties are the rule; all-equal and all-zero scores come up too.
values = st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 0.5]), min_size=1, max_size=40)


def stable_oracle(score: torch.Tensor, k: int) -> torch.Tensor:
    order = sorted(range(score.numel()), key=lambda i: (-float(score[i]), i))
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask


@QUICK
@given(values, st.data())
def test_topk_keeps_exactly_k_and_ties_go_to_the_lowest_index(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    score = torch.tensor(scores)
    mask = topk_mask(score, k)
    assert int(mask.sum()) == k
    assert torch.equal(mask, stable_oracle(score, k))


@QUICK
@given(st.integers(1, 6), st.integers(1, 20), st.data())
def test_every_row_keeps_exactly_k(rows, columns, data):
    k = data.draw(st.integers(0, columns))
    seed = data.draw(st.integers(0, 1000))
    score = torch.randint(0, 4, (rows, columns), generator=torch.Generator().manual_seed(seed))
    mask = topk_rows(score.float(), k)
    for row, kept in zip(score.float(), mask, strict=True):
        assert torch.equal(kept, stable_oracle(row, k))


@pytest.mark.parametrize("fill", [0.0, 3.0])
def test_ties_over_many_chunks_are_filled_in_index_order(fill):
    score = torch.full((3 * (1 << 20) + 5,), fill)
    score[-1] = fill + 1
    k = (1 << 20) + 7
    mask = topk_mask(score, k)
    assert int(mask.sum()) == k
    assert bool(mask[: k - 1].all())
    assert bool(mask[-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_is_selected_alike(dtype):
    score = torch.tensor([3.0, 1.0, 2.0, 2.0], dtype=dtype)
    assert topk_mask(score, 2).tolist() == [True, False, True, False]


@QUICK
@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from(["round", "floor", "ceil"]))
def test_pruned_count_rounds_as_named(numel, sparsity, rounding):
    count = pruned_count(numel, sparsity, rounding=rounding, min_keep=0)
    exact = numel * sparsity
    limits = {
        "round": (exact - 0.5, exact + 0.5),
        "floor": (exact - 1, exact),
        "ceil": (exact, exact + 1),
    }
    low, high = limits[rounding]
    slack = 1e-6
    assert low - slack <= count <= high + slack
    assert 0 <= count <= numel


@pytest.mark.parametrize(
    ("numel", "sparsity", "rounding", "expected"),
    [
        (10, 0.7, "ceil", 7),  # 0.7 * 10 is 7.000000000000001 in floating point
        (10, 1 - 0.9, "floor", 1),  # (1 - 0.9) * 10 is 0.9999999999999998
        (3, 0.5, "round", 2),
        (3, 0.5, "round_kept", 1),  # keeps round(1.5) = 2
        (5, 0.99, "round", 4),  # one survives
        (0, 0.5, "round", 0),
    ],
)
def test_pruned_count_at_the_edges(numel, sparsity, rounding, expected):
    assert pruned_count(numel, sparsity, rounding=rounding) == expected


def test_pruned_fraction_is_capped():
    assert pruned_count(1000, 0.999, rounding="ceil", max_pruned_fraction=0.995) == 995


@QUICK
@given(st.integers(1, 10**5), st.floats(0, 0.999))
def test_paper_count_of_gradual_pruning(numel, sparsity):
    kept = kept_count(numel, 1 - sparsity, rounding="round_kept")
    product = numel * (1 - sparsity)
    if abs(product % 1 - 0.5) > 1e-6:
        assert kept == max(round(product), 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_scores_are_named(bad):
    with pytest.raises(ValueError, match=r"layer\.weight.*1 nan or infinite"):
        require_finite(torch.tensor([1.0, bad]), "layer.weight")


def test_huge_finite_scores_are_not_bad():
    require_finite(torch.full((4,), 3e38), "w")


@pytest.mark.parametrize(
    "call",
    [
        lambda: topk_mask(torch.ones(3), 4),
        lambda: topk_rows(torch.ones(2, 3), -1),
        lambda: kth_largest(torch.ones(3), 0),
        lambda: pruned_count(3, 1.5),
        lambda: pruned_count(3, 0.5, rounding="up"),
        lambda: kept_count(3, -0.1),
    ],
)
def test_counts_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match="must be"):
        call()


def global_selection_seconds(layers, clock):
    from aerogel.sparsity.masks import build_masks

    generator = torch.Generator().manual_seed(0)
    scores = {str(i): torch.rand(2500, 1000, generator=generator) for i in range(layers)}
    best = math.inf
    for _ in range(3):
        start = clock()
        masks = build_masks(scores, 0.1, scope="global")
        best = min(best, clock() - start)
    assert masks.nnz == layers * 250_000
    return best


def test_global_selection_is_linear_work():
    # CPU time, which a busy machine hardly changes; a sort or a Python loop takes far longer.
    assert global_selection_seconds(1, time.process_time) <= 0.5


@pytest.mark.slow
def test_global_selection_of_25_million_weights_takes_at_most_a_second_and_a_half():
    assert global_selection_seconds(10, time.perf_counter) <= 1.5
