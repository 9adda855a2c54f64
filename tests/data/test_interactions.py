"""Interactions: the split by user, the sampling for BPR, and the file of ratings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.data import ASSETS, FetchError, Interactions, load_movielens_100k
from aerogel.data.interactions import read_ratings, split_by_user

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def pairs(users=6, items=15, seed=0):
    chosen = torch.rand(users, items, generator=torch.Generator().manual_seed(seed)) < 0.5
    chosen[:, 0] = True
    return chosen.nonzero().T


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.1, 0.2, 0.5, 0.9]))
def test_every_user_gives_its_share_to_the_test_and_keeps_the_rest(seed, fraction):
    given_pairs = pairs(seed=seed)
    split = split_by_user(given_pairs * 3 + 7, fraction, seed)  # ids with gaps
    assert split.train.shape[1] + split.test.shape[1] == given_pairs.shape[1]
    assert not (split.train_matrix() & split.test_matrix()).any()
    for user in range(6):
        count = int((given_pairs[0] == user).sum())
        assert int((split.test[0] == user).sum()) == int(count * fraction)
        assert (split.train[0] == user).any()
    again = split_by_user(given_pairs * 3 + 7, fraction, seed)
    assert torch.equal(split.test, again.test)


def test_triples_hold_a_training_item_and_another_of_every_user():
    split = split_by_user(pairs(), 0.2, 0)
    generator = torch.Generator().manual_seed(0)
    users, positives, negatives = split.sample_bpr(4000, generator)
    trained = split.train_matrix()
    assert trained[users, positives].all()
    assert not trained[users, negatives].any()
    shares = torch.bincount(users, minlength=6) / 4000
    assert (shares - 1 / 6).abs().max() < 0.03  # users uniformly, not by their items
    seen = torch.zeros_like(trained)
    seen[users, positives] = True
    assert torch.equal(seen, trained)
    assert torch.equal(split.popularity(), trained.sum(0))


def test_bad_interactions_are_named():
    train = torch.tensor([[0, 1], [0, 1]])
    with pytest.raises(ValueError, match=r"train: item ids must be in \[0, 1\), got 0 .. 1"):
        Interactions(2, 1, train, train[:, :0])
    with pytest.raises(ValueError, match="test: user ids"):
        Interactions(2, 2, train, torch.tensor([[-1], [0]]))
    with pytest.raises(ValueError, match="test shares 1 pairs with train"):
        Interactions(2, 3, train, torch.tensor([[0, 0], [0, 2]]))
    with pytest.raises(ValueError, match=r"test must be \(2, pairs\)"):
        Interactions(2, 3, train, torch.zeros(4))
    generator = torch.Generator()
    with pytest.raises(ValueError, match="user 2 has no training item"):
        Interactions(3, 3, train, train[:, :0]).sample_bpr(4, generator)
    with pytest.raises(ValueError, match="user 0 has every item"):
        Interactions(1, 1, train[:, :1], train[:, :0]).sample_bpr(4, generator)
    with pytest.raises(ValueError, match="test_fraction"):
        split_by_user(train, 1.0, 0)


def test_ratings_are_read_and_damaged_lines_named(tmp_path):
    path = tmp_path / "ratings.inter"
    path.write_text(HEADER + "196\t242\t3\t881250949\n186\t302\t4.5\t891717742\n")
    users, items, ratings = read_ratings(path)
    assert users.tolist() == [196, 186]
    assert items.tolist() == [242, 302]
    assert ratings.tolist() == [3.0, 4.5]
    path.write_text(HEADER + "196\t242\t3\n")
    with pytest.raises(ValueError, match="line 2: not four numbers"):
        read_ratings(path)
    path.write_text("user,item\n")
    with pytest.raises(ValueError, match="header must be"):
        read_ratings(path)


def test_movielens_comes_out_of_a_pinned_package():
    asset = ASSETS["movielens-100k"]
    assert asset.packages[0].client == "pip"
    assert asset.packages[0].version == "1.2.1"


@pytest.mark.slow
def test_movielens_has_its_users_and_films():
    try:
        data = load_movielens_100k()
    except FetchError as error:
        pytest.skip(f"MovieLens-100K cannot be had here: {error}")
    assert (data.n_users, data.n_items) == (942, 1447)
    assert data.train.shape[1] + data.test.shape[1] == 55_375
    with pytest.raises(ValueError, match="min_rating=6"):
        load_movielens_100k(min_rating=6)
