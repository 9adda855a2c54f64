"""PointwisePruner: only 1x1 convolutions, equal sparsity, the paper's blocks."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from aerogel import models
from aerogel.pruning import PointwisePruner
from aerogel.pruning.fast_sparse_convnets import (
    PUBLISHED,
    block_patterns,
    parse_blocks,
    select_pointwise,
    train_callback,
)

STEPS = 40


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return models.create_model("mobilenet_v1_laptop", blocks=((16, 1), (32, 2), (32, 1)))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model: nn.Module, pruner: PointwisePruner, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 1, 12, 12, generator=generator)
        pruner.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        pruner.step()


def zeros(model: nn.Module) -> dict[str, float]:
    return {
        name: float((module.weight == 0).float().mean())
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def test_only_1x1_convolutions_become_sparse_and_all_equally() -> None:
    model = small_net()
    pruner = PointwisePruner(model, sgd(model), 0.8, steps=STEPS, frequency=4)
    train(model, pruner, STEPS)
    pruner.finalize()
    pointwise = {name for name, _ in model.prune_targets()}
    assert len(pointwise) == 3
    for name, share in zeros(model).items():
        weights = model.get_submodule(name).weight.numel()
        if name in pointwise:
            assert share == pytest.approx(0.8, abs=1.0 / weights)
        else:
            assert share == 0.0


def test_zeros_come_between_a_tenth_and_three_quarters_of_training() -> None:
    model = small_net()
    pruner = PointwisePruner(model, sgd(model), 0.8, steps=STEPS, frequency=2)
    seen = []
    for step in range(STEPS):
        train(model, pruner, 1, step)
        seen.append(pruner.masks.sparsity())
    assert seen[3] == 0.0
    assert seen[4] == pytest.approx(pruner.sparsity_at(4), abs=0.01)
    assert 0.0 < seen[10] < 0.8
    assert seen[int(0.75 * STEPS)] == pytest.approx(0.8, abs=0.01)
    assert all(a <= b for a, b in itertools.pairwise(seen))
    assert len(set(seen[int(0.75 * STEPS) :])) == 1


def test_masked_weights_keep_their_value_and_may_return() -> None:
    model = small_net()
    pruner = PointwisePruner(model, sgd(model), 0.8, steps=STEPS, begin=0.0, frequency=2)
    train(model, pruner, 14)
    name, mask = next(iter(pruner.masks.items()))
    masked = ~mask.clone()
    stored = pruner.selection[name].parameter
    assert (stored[masked] != 0).any()
    with torch.no_grad():
        stored[~masked] *= 1e-3  # survivors shrink below the masked weights
    train(model, pruner, 3, 14)
    assert pruner.masks[name][masked].any()


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_networks_exist_and_their_blocks_fit(name: str) -> None:
    published = PUBLISHED[name]
    with torch.device("meta"):
        model = models.create_model(published.model, **published.arguments)
    layers = [target for target, _ in model.prune_targets()]
    if published.sparse_classifier:
        layers.append("classifier.1")
    selection = select_pointwise(model, layers)
    assert len(selection) == len(layers)
    patterns = block_patterns(selection, published.blocks)
    blocked = {n for n, pattern in patterns.items() if str(pattern) != "unstructured"}
    prefixes = {
        "12b4": {"features.13."},
        "11-16b2": {f"features.{n}." for n in range(12, 18)},
        "none": set(),
    }[published.blocks]
    assert blocked == {n for n in patterns if any(n.startswith(p) for p in prefixes)}
    assert {str(patterns[n]) for n in blocked} <= {f"block:{published.blocks[-1]}x1"}


def test_blocks_share_their_zeros_where_they_were_asked_for() -> None:
    model = small_net()
    pruner = PointwisePruner(
        model, sgd(model), 0.75, steps=STEPS, frequency=4, blocks={"features.3.*": 4}
    )
    train(model, pruner, STEPS)
    pruner.finalize()
    shared = {}
    for name in ("features.2.1.0", "features.3.1.0"):
        kept = model.get_submodule(name).weight.flatten(1).unflatten(0, (-1, 4)) != 0
        shared[name] = bool((kept.any(1) == kept.all(1)).all())
        assert zeros(model)[name] == pytest.approx(0.75, abs=0.01)
    assert shared == {"features.2.1.0": False, "features.3.1.0": True}


@pytest.mark.parametrize(
    ("notation", "expected"),
    [
        ("none", (range(0), 1)),
        ("12b4", (range(12, 13), 4)),
        ("11-16b2", (range(11, 17), 2)),
    ],
)
def test_the_authors_notation_is_read(notation: str, expected: tuple[range, int]) -> None:
    assert parse_blocks(notation) == expected


def test_a_run_goes_on_bit_for_bit() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, PointwisePruner]:
        model = small_net()
        optimizer = sgd(model)
        options = {"steps": STEPS, "frequency": 4, "blocks": 4}
        return model, optimizer, PointwisePruner(model, optimizer, 0.8, **options)

    model, optimizer, pruner = start()
    train(model, pruner, 20)
    again, its_optimizer, its_pruner = start()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    its_pruner.load_state_dict(copy.deepcopy(pruner.state_dict()))
    for each, its in ((model, pruner), (again, its_pruner)):
        train(each, its, STEPS - 20, 20)
        its.finalize()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_callback_prunes_inside_a_trainer() -> None:
    model = small_net()
    optimizer = sgd(model)

    class Run:
        pass

    run = Run()
    run.model, run.optimizer = model, optimizer
    callback = train_callback(0.8, steps=STEPS, frequency=4)
    callback.on_train_begin(run)
    for step in range(STEPS):
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).logsumexp(1).sum().backward()
        optimizer.step()
        callback.on_optimizer_step(run)
    callback.on_train_end(run)
    assert zeros(model)["features.3.1.0"] == pytest.approx(0.8, abs=0.01)


def test_other_models_offer_their_plain_1x1_convolutions() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 1, stride=2),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    assert list(select_pointwise(net)) == ["1.weight"]
    assert list(select_pointwise(net, ["1", "6"])) == ["1.weight", "6.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\), got -0.1"),
        ({"initial_sparsity": 0.9}, "initial_sparsity <= sparsity"),
        ({"steps": 1}, "steps must be at least 2"),
        ({"begin": 0.8, "end": 0.5}, "begin < end"),
        ({"end": 1.0}, r"end must be in \(0, 1\), got 1.0"),
        ({"frequency": 0}, "frequency must be at least 1"),
        ({"blocks": 3}, r"expected one of \(1, 2, 4\)"),
        ({"blocks": "12c4"}, "blocks='12c4': expected 'none'"),
        ({"blocks": "16-11b2"}, "blocks='16-11b2'"),
        ({"blocks": "12b4"}, r"no pruned layer in block 12 \(features.13\)"),
        ({"blocks": {"nowhere*": 2}}, "unknown blocks: layer 'nowhere"),
        ({"layers": ["features.0.0"]}, "expected a plain 1x1 convolution"),
        ({"layers": ["features.1.0.0"]}, "expected a plain 1x1 convolution"),
        ({"layers": ["featurs.1"]}, "unknown layer 'featurs.1'"),
        ({"coupling": "sticky"}, "coupling"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    model = small_net()
    sparsity = options.pop("sparsity", 0.8)
    with pytest.raises(ValueError, match=message):
        PointwisePruner(model, sgd(model), sparsity, **{"steps": STEPS, **options})


def test_blocks_must_divide_the_channels_and_something_must_be_prunable() -> None:
    odd = nn.Sequential(nn.Conv2d(4, 6, 1))
    with pytest.raises(ValueError, match="6 output channels, which 4 does not divide"):
        PointwisePruner(odd, sgd(odd), 0.5, steps=10, blocks=4)
    wide = nn.Sequential(nn.Conv2d(4, 6, 3))
    with pytest.raises(ValueError, match="no plain 1x1 convolution"):
        PointwisePruner(wide, sgd(wide), 0.5, steps=10)


def test_finishing_before_the_ramp_ends_is_an_error() -> None:
    model = small_net()
    pruner = PointwisePruner(model, sgd(model), 0.8, steps=STEPS)
    train(model, pruner, 10)
    with pytest.raises(RuntimeError, match="before the last pruning at step"):
        pruner.finalize()
