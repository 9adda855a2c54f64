import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.sparsity.row_order import BlockedRows, kept_energy, order_rows


def layer(weight, block, sparsity, balanced=False, fixed=None):
    rows, units = weight.shape
    blocks = -(-rows // block)
    keep = round((1 - sparsity) * (units if balanced else blocks * units))
    return BlockedRows(
        weight.double().square(),
        torch.arange(rows) // block,
        torch.zeros(blocks, units, dtype=torch.double) if fixed is None else fixed,
        max(keep, 1),
        balanced,
    )


def alike_rows(rows, units, seed):
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(max(rows // 6, 2), units, generator=generator)
    which = torch.randint(len(kinds), (rows,), generator=generator)
    sizes = torch.rand(rows, 1, generator=generator) + 0.1
    return (kinds[which] + 0.5 * torch.randn(rows, units, generator=generator)) * sizes


@pytest.mark.parametrize("balanced", [False, True])
def test_six_rows_are_dealt_as_the_search_of_all_groupings_deals_them(balanced):
    for case in range(50):
        weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(case))
        rows = layer(weight, 3, 0.5, balanced)
        groupings = (
            torch.tensor([0, *pair, *(set(range(1, 6)) - set(pair))])
            for pair in itertools.combinations(range(1, 6), 2)
        )
        best = max(kept_energy([rows], order) for order in groupings)
        assert kept_energy([rows], order_rows([rows])) >= 0.98 * best


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 30),
    units=st.integers(1, 12),
    block=st.integers(1, 8),
    sparsity=st.floats(0, 0.9),
    balanced=st.booleans(),
    seed=st.integers(0, 99),
)
def test_an_order_is_a_permutation_that_never_keeps_less(
    rows, units, block, sparsity, balanced, seed
):
    blocked = layer(alike_rows(rows, units, seed), min(block, rows), sparsity, balanced)
    order = order_rows([blocked])
    identity = torch.arange(rows)
    assert torch.equal(order.sort().values, identity)
    assert kept_energy([blocked], order) >= kept_energy([blocked], identity) - 1e-12


@pytest.mark.parametrize("balanced", [False, True])
def test_exchanges_only_add_to_what_the_greedy_start_keeps(balanced):
    sizes = torch.rand(64, 1, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) * sizes
    blocked = layer(weight, 4, 0.6, balanced)
    kept = [
        kept_energy([blocked], order_rows([blocked], trials=trials))
        for trials in (0, 50, 400, 2000)
    ]
    assert kept == sorted(kept)
    assert kept[-1] > kept[0]


def test_rows_of_one_kind_become_neighbours():
    kinds = torch.eye(4).repeat_interleave(5, dim=1)  # four kinds of rows without common units
    weight = kinds.repeat(4, 1)
    blocked = layer(weight, 4, 0.75)
    total = float(weight.square().sum())
    assert kept_energy([blocked], torch.arange(16)) == pytest.approx(0.25 * total)
    assert kept_energy([blocked], order_rows([blocked])) == pytest.approx(total)


def test_layers_that_share_an_order_are_both_counted():
    first, second = (layer(alike_rows(32, 20, seed), 4, 0.5) for seed in (0, 1))
    identity, order = torch.arange(32), order_rows([first, second])
    together = kept_energy([first, second], order)
    assert together > kept_energy([first, second], identity)
    assert together >= kept_energy([first, second], order_rows([first]))


def test_rows_that_stay_take_part_in_their_blocks():
    kinds = torch.eye(2).repeat_interleave(3, dim=1)
    # Each block holds one row that stays, of the kind opposite to its first two rows.
    fixed = kinds.flip(0).double()
    moving = kinds[[0, 0, 1, 1]]
    blocked = BlockedRows(moving.double(), torch.tensor([0, 0, 1, 1]), fixed, 6)
    order = order_rows([blocked])
    assert order.tolist()[:2] in ([2, 3], [3, 2])


def test_the_same_seed_gives_the_same_order():
    blocked = layer(alike_rows(40, 16, 5), 4, 0.5)
    orders = [
        order_rows([blocked], generator=torch.Generator().manual_seed(seed)) for seed in (1, 1)
    ]
    assert torch.equal(*orders)


def test_rows_of_zeros_and_single_blocks_are_no_trouble():
    for weight, block in ((torch.zeros(8, 3), 2), (torch.randn(3, 5), 3), (torch.randn(1, 5), 1)):
        order = order_rows([layer(weight, block, 0.5)])
        assert torch.equal(order.sort().values, torch.arange(len(weight)))
