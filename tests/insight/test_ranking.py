"""Ranking measures against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

from aerogel.insight import ndcg_at_k, rank_correlation, recall_at_k


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 12))
def test_measures_are_those_of_the_reference(seed, items, k):
    generator = torch.Generator().manual_seed(seed)
    k = min(k, items)
    scores = torch.stack([torch.randperm(items, generator=generator) for _ in range(5)]).float()
    relevant = torch.rand(5, items, generator=generator) < 0.4
    relevant[0, 0] = True
    some = relevant.any(1)
    expected = ndcg_score(relevant[some].int().numpy(), scores[some].numpy(), k=k)
    assert ndcg_at_k(scores, relevant, k) == pytest.approx(expected)
    recalls = []
    for row, wanted in zip(scores.tolist(), relevant.tolist(), strict=True):
        best = sorted(range(items), key=lambda i: -row[i])[:k]
        if any(wanted):
            recalls.append(sum(wanted[i] for i in best) / sum(wanted))
    assert recall_at_k(scores, relevant, k) == pytest.approx(np.mean(recalls))


def test_training_items_are_not_in_the_list():
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0]])
    relevant = torch.tensor([[False, False, True, False]])
    trained = torch.tensor([[True, True, False, False]])
    assert recall_at_k(scores, relevant, 1) == 0.0
    assert recall_at_k(scores, relevant, 1, trained) == 1.0
    assert ndcg_at_k(scores, relevant, 1, trained) == 1.0


def test_users_without_test_items_do_not_count():
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    relevant = torch.tensor([[True, False], [False, False]])
    assert recall_at_k(scores, relevant, 1) == ndcg_at_k(scores, relevant, 1) == 1.0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_rank_correlation_is_spearmans(pairs):
    a, b = torch.tensor(pairs).T
    if len(a.unique()) > 1 and len(b.unique()) > 1:
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)


def test_bad_input_is_named():
    scores = torch.rand(2, 4)
    relevant = torch.zeros(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="relevant has no item"):
        recall_at_k(scores, relevant, 2)
    relevant[0, 1] = True
    with pytest.raises(ValueError, match=r"k must be in \[1, 4\], got 5"):
        ndcg_at_k(scores, relevant, 5)
    with pytest.raises(ValueError, match="share 1 entries: test items were trained on"):
        recall_at_k(scores, relevant, 2, relevant)
    with pytest.raises(ValueError, match="relevant must be bool"):
        recall_at_k(scores, relevant.float(), 2)
    with pytest.raises(ValueError, match="nan"):
        recall_at_k(scores * float("nan"), relevant, 2)
    with pytest.raises(ValueError, match="vectors of one length"):
        rank_correlation(scores, scores)
