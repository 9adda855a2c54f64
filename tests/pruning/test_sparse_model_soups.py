"""Sparse model soups, promise by promise."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aerogel import runtime
from aerogel.pruning import SparseModelSoups
from aerogel.sparsity import (
    MaskController,
    average_models,
    recalibrate_batchnorm,
    select_parameters,
)


def net(norm=True, seed=0):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(24)] if norm else []
    return nn.Sequential(nn.Linear(12, 24), *middle, nn.ReLU(), nn.Linear(24, 5))


def batches():
    return list(torch.randn(60, 12, generator=torch.Generator().manual_seed(7)).split(20))


def retrain(model, masks, variation):
    """Fifteen steps on data in the order of the seed; a top-level function, for workers."""
    lr = 0.1 if variation.vary != "lr" else variation.value
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    controller = MaskController(model, optimizer, select_parameters(model), "hard", masks=masks)
    generator = torch.Generator().manual_seed(variation.seed)
    model.train()
    for _ in range(15):
        x = torch.randn(16, 12, generator=generator)
        y = (x[:, :5] * 2).argmax(1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        controller.step()
    controller.finalize()
    return model


def same(model, masks, variation):
    """Every copy alike."""
    variation = copy.copy(variation)
    object.__setattr__(variation, "seed", 3)
    return retrain(model, masks, variation)


def score(model):
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((model(x).argmax(1) == x[:, :5].argmax(1)).float().mean())


def soups(model=None, fn=retrain, **options):
    options = {"sparsity": 0.8, "cycles": 3, "copies": 3, "batches": batches(), **options}
    return SparseModelSoups(model or net(), fn, **options)


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_soups_have_the_zeros_of_their_copies_and_sparsity_rises_geometrically():
    model = net()
    before = copy.deepcopy(model.state_dict())
    found = soups(model).run()
    assert equal(before, model.state_dict())
    share = 1 - 0.2 ** (1 / 3)
    numel = 12 * 24 + 24 * 5
    earlier = None
    for number, cycle in enumerate(found.cycles, start=1):
        assert abs(cycle.sparsity - (1 - (1 - share) ** number)) * numel <= 1
        for state in (*cycle.ingredients, cycle.soup):
            for name, mask in cycle.masks.items():
                assert torch.equal(state[name] != 0, mask)
        if earlier is not None:
            assert not any(bool((m & ~earlier[n]).any()) for n, m in cycle.masks.items())
        earlier = cycle.masks
    assert found.cycles[-1].masks.numel - sum(int(m.sum()) for m in earlier.values()) == round(
        0.8 * numel
    )
    assert equal(found.model.state_dict(), found.cycles[-1].soup)


def test_copies_differ_by_seed_and_a_run_repeats_itself():
    first, second = soups(cycles=1).run(), soups(cycles=1).run()
    copies = first.cycles[0].ingredients
    assert not equal(copies[0], copies[1])
    for a, b in zip(copies, second.cycles[0].ingredients, strict=True):
        assert equal(a, b)


def test_a_function_may_make_the_model():
    made = soups(net, cycles=1).run()
    assert equal(made.model.state_dict(), soups(net(), cycles=1).run().model.state_dict())


def test_copies_that_are_alike_make_a_soup_like_them():
    cycle = soups(net(norm=False), same, cycles=1, batches=None).run().cycles[0]
    assert equal(cycle.soup, cycle.ingredients[0])


def test_the_order_of_copies_does_not_matter():
    states = soups(cycles=1).run().cycles[0].ingredients
    forth, back = average_models(states), average_models(states[::-1])
    for name, value in forth.items():
        torch.testing.assert_close(value, back[name], rtol=1e-5, atol=1e-6)


def test_batch_norm_is_estimated_anew_and_weights_are_left_alone():
    search = soups(cycles=1, bn_fraction=1.0)
    cycle = search.run().cycles[0]
    probe = net()
    probe.load_state_dict(average_models(cycle.ingredients))
    recalibrate_batchnorm(probe, batches(), 1.0)
    assert equal(dict(probe.state_dict()), cycle.soup)
    inputs = torch.cat([F.linear(x, cycle.soup["0.weight"], cycle.soup["0.bias"])
                        for x in batches()])  # fmt: skip
    torch.testing.assert_close(cycle.soup["1.running_mean"], inputs.mean(0), rtol=1e-4, atol=1e-5)


def test_a_fifth_of_the_batches_suffices_by_default():
    ten = [torch.randn(8, 12, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    found = soups(cycles=1, batches=ten).run().cycles[0]
    probe = net()
    probe.load_state_dict(average_models(found.ingredients))
    assert recalibrate_batchnorm(probe, ten[:2], 1.0) == 2
    assert equal(dict(probe.state_dict()), found.soup)


def test_greedy_soups_are_never_worse_than_their_best_copy():
    for seed in range(3):
        found = soups(net(seed=seed), soup="greedy", score_fn=score, seed=10 * seed).run()
        for cycle in found.cycles:
            assert cycle.soup_score >= max(cycle.ingredient_scores)
            assert cycle.members[0] == max(range(3), key=lambda i: cycle.ingredient_scores[i])


def test_another_thing_than_the_seed_can_differ():
    seen = []

    def record(model, masks, variation):
        seen.append(variation)
        return retrain(model, masks, variation)

    soups(fn=record, cycles=1, vary="lr", values=(0.05, 0.1, 0.2)).run()
    assert [v.value for v in seen] == [0.05, 0.1, 0.2]
    assert len({v.seed for v in seen}) == 1
    assert {v.schedule for v in seen} == {"LLR"}


def test_a_killed_run_goes_on_with_the_first_missing_copy(tmp_path):
    calls = []

    def killed(model, masks, variation):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append((variation.cycle, variation.copy))
        return retrain(model, masks, variation)

    with pytest.raises(KeyboardInterrupt):
        soups(fn=killed, run_dir=tmp_path).run()
    assert calls == [(1, 0), (1, 1), (1, 2), (2, 0)]
    calls.append(None)
    found = soups(fn=killed, run_dir=tmp_path).run()
    assert calls[5:] == [(2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]
    assert equal(found.model.state_dict(), soups().run().model.state_dict())
    with pytest.raises(ValueError, match="belongs to another run"):
        soups(run_dir=tmp_path, sparsity=0.5).run()
    with pytest.raises(ValueError, match="belongs to another run"):
        soups(net(seed=1), run_dir=tmp_path).run()


def test_workers_give_the_same_copies():
    alone = soups(cycles=1).run()
    together = soups(cycles=1, workers=2).run()
    for a, b in zip(alone.cycles[0].ingredients, together.cycles[0].ingredients, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name])


def test_copies_with_other_zeros_are_refused():
    dense = net(norm=False)
    search = soups(net(norm=False), lambda *_: copy.deepcopy(dense), cycles=1, batches=None)
    with pytest.raises(ValueError, match="mask"):
        search.run()


def test_the_soup_compiles_to_the_same_outputs():
    model = soups(cycles=1).run().model.eval()
    x = torch.randn(4, 12)
    compiled = runtime.compile(model, (x,), threads=1)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": 1}, "copies must be at least 2, got 1"),
        ({"cycles": 0}, "cycles must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"sparsity": 1.0}, r"sparsity must be in \(0, 1\), got 1.0"),
        ({"vary": "width"}, "vary must be one of 'seed', .*, got 'width'"),
        ({"vary": "seed", "values": (1, 2, 3)}, r"values: vary='seed' takes none.*\(1, 2, 3\)"),
        ({"vary": "lr", "values": (0.1, -1.0, 0.2)}, "each of values must be in"),
        ({"schedule": "LLLR"}, "schedule must be one of .*'LLR'.*, got 'LLLR'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"vary": "lr", "values": (0.1,)}, "one for each of 3 copies, got 1"),
        ({"soup": "greedy"}, "give score_fn"),
        ({"soup": "thick"}, "got 'thick'"),
        ({"scope": "row"}, "got 'row'"),
        ({"bn_fraction": 0.0}, "bn_fraction must be in"),
        ({"batches": []}, "has batch norm: give batches"),
        ({"batches": None}, "has batch norm: give batches"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        soups(**options)
