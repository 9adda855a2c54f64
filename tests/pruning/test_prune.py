"""One call prunes a network by any method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from aerogel.pruning import METHODS, RewritingMethod, prune
from aerogel.pruning.run import task_loss
from aerogel.pruning.selection import parameters_for
from every_method import STEPS, Net, batches, natural, samples

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # methods on layers so tiny


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))


def points() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 16, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(6)
    ]


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][name]) for name, value in states[0].items()
    )


def zeros(model: nn.Module, names: tuple[str, ...]) -> float:
    weights = [model.get_parameter(name) for name in names]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize("slug", list(METHODS))
def test_every_method_leaves_a_plain_network_with_its_zeros(slug: str) -> None:
    method, model = METHODS[slug], Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pattern, sparsity = natural(slug)
    random = torch.get_rng_state()
    sparse = prune(model, slug, sparsity, data=batches(), fresh=Net)
    assert torch.equal(torch.get_rng_state(), random)
    assert not sparse.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    if isinstance(method, RewritingMethod):
        names = method.masked(sparse)
        assert sparse.state_dict().keys() != before.keys()
    else:
        names = parameters_for(method, model, pattern)
        assert sparse.state_dict().keys() == before.keys()
    if names:
        assert zeros(sparse, names) == pytest.approx(sparsity, abs=0.06)
    assert torch.isfinite(sparse(samples()[0])).all()
    assert same(sparse, prune(model, slug, sparsity, data=batches(), fresh=Net))


@pytest.mark.parametrize("slug", ["gradual-pruning", "wanda", "lottery-ticket"])
def test_it_is_what_the_method_does_in_a_loop_of_ones_own(slug: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), 0.05)

    settings: dict[str, Any] = {"data": points(), "optimizer": sgd, "updates": 3, "seed": 5}
    sparse = prune(mlp(), slug, 0.8, **settings, on_progress=lambda *at: seen.append(at))
    if METHODS[slug].one_shot:
        assert [done for done, _, _ in seen] == [1, 2]
    else:
        assert [done for done, _, _ in seen][:6] == [1, 2, 3, 4, 5, 6]
        assert seen[0][1] == 6
    kept = prune(mlp(), slug, 0.8, **settings, folder=tmp_path)
    assert same(sparse, kept)
    assert bool(list(tmp_path.rglob("*.safetensors"))) == (slug == "lottery-ticket")


def test_data_is_gone_through_as_often_as_the_steps_need() -> None:
    taken: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        taken.append(len(batch[0]))
        return F.cross_entropy(model(batch[0]), batch[1])

    x, y = (torch.cat(part) for part in zip(*points(), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    one, two = (
        prune(mlp(), "gradual-pruning", 0.5, data=loader, steps=5, loss=loss) for _ in range(2)
    )
    assert taken == 2 * [32, 16, 32, 16, 32]
    assert same(one, two)  # the order of the data too comes from the seed
    assert not same(one, prune(mlp(), "gradual-pruning", 0.5, data=loader, steps=5, seed=1))


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(points())


@pytest.mark.parametrize(
    "data", [lambda: DataLoader(Stream(), batch_size=None), lambda: iter(points())]
)
def test_data_of_unknown_length_is_one_pass(data: Any) -> None:
    wanted = prune(mlp(), "gradual-pruning", 0.5, data=points())
    assert same(prune(mlp(), "gradual-pruning", 0.5, data=data()), wanted)


def test_batches_may_be_mappings_as_transformers_takes_them() -> None:
    mappings = [{"x": x, "labels": y} for x, y in batches()]
    pairs = prune(Net(), "gradual-pruning", 0.5, data=batches())
    assert same(prune(Net(), "gradual-pruning", 0.5, data=mappings), pairs)
    assert same(
        prune(Net(), "wanda", 0.5, data=mappings), prune(Net(), "wanda", 0.5, data=batches())
    )
    with pytest.raises(TypeError, match="no 'loss' for a batch of x"):
        prune(Net(), "gradual-pruning", 0.5, data=[{"x": batches()[0][0]}])


def test_the_loss_follows_the_target() -> None:
    model, (x, classes) = mlp().eval(), points()[0]
    target = torch.randn(8, 4)
    assert torch.equal(task_loss(model, (x, classes)), F.cross_entropy(model(x), classes))
    assert torch.equal(task_loss(model, [x, target]), F.mse_loss(model(x), target))
    for odd in (x, (x,), (x, classes, classes)):
        with pytest.raises(TypeError, match=r"must be \(input, target\) or a mapping"):
            task_loss(model, odd)


def test_a_search_takes_what_it_is_told_of_initial_weights_and_scores() -> None:
    seeds: list[int] = []

    def fresh(seed: int) -> nn.Module:
        seeds.append(seed)
        return mlp(seed)

    told = prune(mlp(), "lottery-ticket", 0.5, data=points(), fresh=fresh, score=lambda m: 0.0)
    assert set(seeds) == {0}
    assert zeros(told, ("0.weight", "3.weight")) == pytest.approx(0.5, abs=0.02)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = mlp(), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.net(x)  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"Scaled.*pass fresh="):
        prune(Scaled(), "lottery-ticket", 0.5, data=points())


def test_patterns_and_globs_choose_what_is_zero() -> None:
    blocks = prune(mlp(), "magnitude", 0.5, pattern="4x1", exclude=["3.*"])
    assert zeros(blocks, ("3.weight",)) == 0.0
    groups = blocks.get_parameter("0.weight").unflatten(0, (8, 4)) == 0
    assert torch.equal(groups.all(1), groups.any(1))
    assert zeros(prune(mlp(), "magnitude", pattern="2:4"), ("0.weight",)) == 0.5
    assert zeros(prune(mlp(), "magnitude", 0.5, include=["3.*"]), ("0.weight",)) == 0.0


def test_an_unknown_method_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="method = 'magic' is unknown") as caught:
        prune(mlp(), "magic", 0.5)
    assert all(slug in str(caught.value) for slug in METHODS)
    assert same(prune(mlp(), "MAGNITUDE", 0.5), prune(mlp(), "magnitude", 0.5))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        prune(mlp(), "magnitude", sparsity)


def test_a_sparsity_that_the_pattern_does_not_fix_must_be_told_and_one_it_fixes_must_agree() -> (
    None
):
    with pytest.raises(ValueError, match="sparsity is missing"):
        prune(mlp(), "magnitude")
    with pytest.raises(ValueError, match=r"contradicts pattern = '2:4', which means 0\.5"):
        prune(mlp(), "magnitude", 0.75, pattern="2:4")


@pytest.mark.parametrize("slug", [slug for slug in METHODS if slug != "magnitude"])
def test_a_method_that_needs_data_says_so(slug: str) -> None:
    with pytest.raises(ValueError, match=f"method = '{slug}' needs data"):
        prune(Net(), slug, natural(slug)[1])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="rigl prunes by unstructured"):
        prune(mlp(), "rigl", 0.5, pattern="4x1", data=points())
    with pytest.raises(ValueError, match="cannot prune this network"):
        prune(mlp(), "a-priori-compression", 0.5, data=points())
    with pytest.raises(ValueError, match="steps must be at least 1"):
        prune(mlp(), "rigl", 0.5, data=points(), steps=0)
    with pytest.raises(ValueError, match="nope"):
        prune(mlp(), "magnitude", 0.5, include=["nope"])
    with pytest.raises(TypeError, match="update"):
        prune(mlp(), "magnitude", 0.5, update=3)


def test_one_pass_is_the_default() -> None:
    assert len(batches()) == STEPS
    steps = []
    prune(
        Net(), "rigl", 0.5, data=batches(), on_progress=lambda done, total, _: steps.append(total)
    )
    assert set(steps) == {STEPS}
