"""Who chose what: implicit feedback of users on items, split by user, and pairs to train on.

`load_movielens_100k` reads the 100,000 real ratings of MovieLens-100K.

Reference: Harper and Konstan, "The MovieLens Datasets", ACM TiiS 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from aerogel.data.fetching import Progress, fetch

_HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"


@dataclass(frozen=True)
class Interactions:
    """Positive interactions of users with items, in a training and a test part.

    Attributes:
        n_users: users.
        n_items: items.
        train: (2, pairs) int64: user, item.
        test: (2, pairs) int64.

    Raises:
        ValueError: ids out of range, or a pair in both parts.
    """

    n_users: int
    n_items: int
    train: Tensor
    test: Tensor

    def __post_init__(self) -> None:
        for name, pairs in (("train", self.train), ("test", self.test)):
            if pairs.dim() != 2 or pairs.shape[0] != 2:
                raise ValueError(f"{name} must be (2, pairs), got {tuple(pairs.shape)}")
            for kind, ids, count in zip(
                ("user", "item"), pairs, (self.n_users, self.n_items), strict=True
            ):
                if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
                    raise ValueError(
                        f"{name}: {kind} ids must be in [0, {count}), "
                        f"got {int(ids.min())} .. {int(ids.max())}"
                    )
        shared = int(torch.isin(self._keys(self.test), self._train_keys).sum())
        if shared:
            raise ValueError(f"test shares {shared} pairs with train")

    def popularity(self) -> Tensor:
        """Training interactions of each item: (n_items,) int64."""
        return torch.bincount(self.train[1], minlength=self.n_items)

    def train_matrix(self) -> Tensor:
        """(n_users, n_items) bool of training pairs."""
        return self._matrix(self.train)

    def test_matrix(self) -> Tensor:
        """(n_users, n_items) bool of test pairs."""
        return self._matrix(self.test)

    def sample_bpr(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Users drawn uniformly, a training item of each, and an item each has not trained on.

        Args:
            count: triples.
            generator: on the CPU.

        Returns:
            users, positives, negatives: (count,) int64 each.

        Raises:
            ValueError: a user without training items, or one who has them all.
        """
        degree = self._degree
        for problem, where in (
            ("no training item", degree == 0),
            ("every item", degree == self.n_items),
        ):
            if bool(where.any()):
                user = int(where.nonzero()[0])
                raise ValueError(
                    f"user {user} has {problem}: BPR needs one that was chosen and one "
                    f"that was not ({int(where.sum())} users like it)"
                )
        users = torch.randint(self.n_users, (count,), generator=generator)
        first = degree.cumsum(0) - degree
        offset = (
            torch.rand(count, generator=generator, dtype=torch.float64) * degree[users]
        ).long()
        positives = self._train_keys[first[users] + offset] % self.n_items
        negatives = torch.randint(self.n_items, (count,), generator=generator)
        again = self._trained_on(users, negatives).nonzero().flatten()
        while len(again):
            negatives[again] = torch.randint(self.n_items, (len(again),), generator=generator)
            again = again[self._trained_on(users[again], negatives[again])]
        return users, positives, negatives

    @cached_property
    def _train_keys(self) -> Tensor:
        return self._keys(self.train).unique()

    @cached_property
    def _degree(self) -> Tensor:
        """Different training items of each user."""
        return torch.bincount(self._train_keys // self.n_items, minlength=self.n_users)

    def _keys(self, pairs: Tensor) -> Tensor:
        return pairs[0] * self.n_items + pairs[1]

    def _trained_on(self, users: Tensor, items: Tensor) -> Tensor:
        keys = users * self.n_items + items
        place = torch.searchsorted(self._train_keys, keys).clamp(max=len(self._train_keys) - 1)
        return self._train_keys[place] == keys

    def _matrix(self, pairs: Tensor) -> Tensor:
        matrix = torch.zeros(self.n_users, self.n_items, dtype=torch.bool)
        matrix[pairs[0], pairs[1]] = True
        return matrix


def load_movielens_100k(
    cache_dir: str | Path | None = None,
    on_progress: Progress | None = None,
    *,
    min_rating: float = 4.0,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Interactions:
    """Fetch (once) MovieLens-100K and split every user's liked films at random.

    Args:
        cache_dir: cache folder.
        on_progress: called as `(what, bytes_done, bytes_total)` while bytes arrive.
        min_rating: ratings from here on are positive, the rest is left out (1 to 5 stars).
        test_fraction: share of each user's films for the test, rounded down; in (0, 1).
        seed: of the split.

    Returns:
        942 users and 1,447 films at 4 stars and above, numbered in the order of their ids.

    Raises:
        ValueError: arguments out of range, nothing left.
        FetchError: the ratings cannot be had from any origin.
    """
    folder = fetch("movielens-100k", cache_dir=cache_dir, on_progress=on_progress)
    users, items, ratings = read_ratings(folder / "ml-100k.inter")
    liked = ratings >= min_rating
    if not bool(liked.any()):
        raise ValueError(f"min_rating={min_rating} leaves no rating; they end at {ratings.max()}")
    return split_by_user(torch.stack((users[liked], items[liked])), test_fraction, seed)


def read_ratings(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Read a table of ratings: tab-separated user, item, rating and time under a header.

    Returns:
        User and item ids (int64) and ratings (float64), one entry a line.

    Raises:
        ValueError: another header, or a line that is not four numbers.
    """
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    if header != _HEADER:
        raise ValueError(f"{path}: header must be {_HEADER!r}, got {header!r}")
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            user, item, rating, _ = map(float, line.split("\t"))
        except ValueError:
            raise ValueError(f"{path}, line {number}: not four numbers: {line!r}") from None
        rows.append((user, item, rating))
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
    return table[:, 0].long(), table[:, 1].long(), table[:, 2]


def split_by_user(pairs: Tensor, test_fraction: float, seed: int) -> Interactions:
    """Number users and items from 0 and move a share of each user's items to the test.

    Args:
        pairs: (2, pairs) ids of users and items.
        test_fraction: rounded down for every user, in (0, 1), so that all keep training items.
        seed: of the choice.

    Raises:
        ValueError: test_fraction out of range.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"test_fraction must be in (0, 1), got {test_fraction}")
    known_users, users = pairs[0].unique(return_inverse=True)
    known_items, items = pairs[1].unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(users), generator=generator)
    order = order[users[order].argsort(stable=True)]  # by user, at random within
    counts = torch.bincount(users)
    place = torch.arange(len(users)) - (counts.cumsum(0) - counts)[users[order]]
    held_out = place < (counts * test_fraction).floor()[users[order]]
    shuffled = torch.stack((users, items))[:, order]
    return Interactions(
        len(known_users), len(known_items), shuffled[:, ~held_out], shuffled[:, held_out]
    )
