"""Random pruning, promise by promise."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import aerogel
from aerogel.models import CifarResNet
from aerogel.pruning import StaticSparseTrainer, layerwise_report, random_prune
from aerogel.sparsity import (
    Block,
    MaskSet,
    kept_count,
    random_masks,
    select_parameters,
)
from aerogel.train import sparse_training, to_dense

QUICK = settings(max_examples=25, deadline=None)


def net(seed=0, width=32):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, width),
        nn.ReLU(),
        nn.Linear(width, 4),
    )


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def batches(count=8, size=32):
    source = seeded(0)
    for _ in range(count):
        x = torch.randn(size, 1, 4, 4, generator=source)
        yield x, torch.randint(0, 4, (size,), generator=source)


SCORED = {"loader": list(batches()), "loss_fn": F.cross_entropy}


@pytest.mark.parametrize(
    "allocation",
    ["uniform", "uniform_plus", "er", "erk", "er_plus", "erk_plus", "snip", "grasp"],
)
@pytest.mark.parametrize("density", [0.2, 0.5])
def test_every_allocation_spends_the_budget(allocation, density):
    model = net()
    total = select_parameters(model).numel
    masks = random_prune(model, density, allocation=allocation, **SCORED)
    assert abs(masks.nnz - density * total) <= len(masks)
    assert MaskSet.from_weights(model) == masks


def test_counts_are_exact_and_the_pruned_weights_are_zero():
    model = net()
    before = {n: r.parameter.detach().clone() for n, r in select_parameters(model).items()}
    masks = random_prune(model, 0.3, allocation="uniform")
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert int(mask.sum()) == kept_count(mask.numel(), 0.3)
        assert torch.equal(weight, torch.where(mask, before[name], 0.0))
    assert model[0].bias.any()
    assert bool((model[1].weight == 1).all())


def test_the_mask_is_a_function_of_the_generator():
    masks = [random_prune(net(), 0.2, generator=seeded(s)) for s in (1, 1, 2)]
    assert masks[0] == masks[1] != masks[2]
    assert random_prune(net(), 0.2) == random_prune(net(), 0.2)


def test_masks_of_two_seeds_overlap_as_chance_says():
    one, two = (
        random_prune(nn.Linear(300, 300), 0.2, generator=seeded(s))["weight"] for s in (1, 2)
    )
    numel, density = one.numel(), 0.2
    expected = density**2 * numel
    # Hypergeometric: five standard deviations.
    deviation = density * (1 - density) * numel**0.5
    assert abs(int((one & two).sum()) - expected) < 5 * deviation


def test_independent_draws_fluctuate_as_a_binomial():
    numel, density = 200 * 200, 0.1
    counts = [
        int(random_prune(nn.Linear(200, 200), density, exact=False, generator=seeded(s)).nnz)
        for s in range(20)
    ]
    deviation = (density * (1 - density) * numel) ** 0.5
    assert len(set(counts)) > 10
    assert all(abs(c - density * numel) < 5 * deviation for c in counts)
    spread = torch.tensor(counts).float().std()
    assert 0.5 * deviation < float(spread) < 1.6 * deviation


def test_erk_on_a_thin_resnet_20_is_the_closed_form():
    model = CifarResNet(20, 8)
    shapes = {n: tuple(r.shape) for n, r in select_parameters(model).items()}
    sizes = {n: torch.Size(s).numel() for n, s in shapes.items()}
    raw = {n: sum(s) / sizes[n] for n, s in shapes.items()}
    dense = set()
    while True:
        sparse = [n for n in shapes if n not in dense]
        eps = 0.05 * sum(sizes.values()) - sum(sizes[n] for n in dense)
        eps /= sum(sum(shapes[n]) for n in sparse)
        top = max(raw[n] for n in sparse)
        if eps * top <= 1:
            break
        dense |= {n for n in sparse if raw[n] == top}
    masks = random_prune(model, 0.05)
    for name, mask in masks.items():
        wanted = 1.0 if name in dense else eps * raw[name]
        assert abs(int(mask.sum()) - wanted * sizes[name]) <= 1
    assert len({round(d, 3) for d in masks.layer_density().values()}) > 3


@QUICK
@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=2, max_size=6), st.data()
)
def test_the_order_of_layers_does_not_change_erk_densities(shapes, data):
    order = data.draw(st.permutations(range(len(shapes))))
    layers = [nn.Linear(*shape) for shape in shapes]

    def densities(places):
        model = nn.ModuleDict({f"l{i}": layers[i] for i in places})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return random_prune(model, 0.3).layer_density()

    first, second = densities(range(len(shapes))), densities(order)
    assert first == {name: second[name] for name in first}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_dead_weights_stay_dead_for_100_steps(optimizer):
    model = net()
    masks = random_prune(model, 0.1)
    trainer = StaticSparseTrainer(model, optimizer(model.parameters()), masks)
    before = copy.deepcopy(model.state_dict())
    data = SCORED["loader"]
    for step in range(100):
        x, y = data[step % len(data)]
        trainer.controller.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        trainer.step()
    state = trainer.controller.optimizer.state
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert bool((weight[~mask] == 0).all())
        assert bool((weight[mask] != before[name][mask]).any())
        for value in state[weight].values():
            if torch.is_tensor(value) and value.shape == mask.shape:
                assert bool((value[~mask] == 0).all())
    assert trainer.finalize() == masks


def test_a_killed_static_training_resumes_bit_for_bit():
    def fresh():
        model = net()
        masks = random_prune(model, 0.2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return model, optimizer, StaticSparseTrainer(model, optimizer, masks)

    def steps(model, optimizer, trainer, chosen):
        for x, y in chosen:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            trainer.step()

    data = SCORED["loader"]
    whole = fresh()
    steps(*whole, data)
    half = fresh()
    steps(*half, data[:4])
    saved = copy.deepcopy([part.state_dict() for part in half])
    rest = fresh()
    for part, state in zip(rest, saved, strict=True):
        part.load_state_dict(state)
    steps(*rest, data[4:])
    for name, value in whole[0].state_dict().items():
        assert torch.equal(rest[0].state_dict()[name], value), name


def test_scaled_weights_have_the_variance_that_fewer_inputs_need():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 300))
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight)
    masks = random_prune(model, 0.1, scale_init=True)
    for name, mask in masks.items():
        density = float(mask.float().mean())
        fan_in = mask.shape[1]
        wanted = (2 / (fan_in * density)) ** 0.5
        kept = model.get_parameter(name)[mask]
        assert float(kept.detach().std()) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("pattern", ["unstructured", "filter"])
def test_a_layer_of_which_nothing_was_drawn_keeps_one_unit_and_is_named(pattern):
    for seed in range(40):
        model = nn.Linear(16, 32)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            masks = random_prune(
                model,
                0.04 if pattern == "filter" else 0.003,
                exact=False,
                scale_init=True,
                pattern=pattern,
                allocation="uniform",
                generator=seeded(seed),
            )
        assert masks["weight"].any()
        assert model.weight.isfinite().all()
        if caught:
            assert masks.nnz == (16 if pattern == "filter" else 1)
            assert "'weight' was drawn without a weight" in str(caught[0].message)
            return
    raise AssertionError("no seed drew an empty layer: the case is not tested")


@pytest.mark.parametrize("allocation", ["snip", "grasp"])
def test_scores_give_ratios_not_places_and_leave_the_model_alone(allocation):
    model = net()
    before = copy.deepcopy(model.state_dict())
    one, two = (
        random_prune(
            copy.deepcopy(model), 0.2, allocation=allocation, generator=seeded(s), **SCORED
        )
        for s in (0, 0)
    )
    assert one == two
    assert one != random_prune(
        copy.deepcopy(model), 0.2, allocation=allocation, generator=seeded(1), **SCORED
    )
    densities = one.layer_density()
    assert max(densities.values()) - min(densities.values()) > 0.02
    pruned = random_prune(model, 0.2, allocation=allocation, generator=seeded(0), **SCORED)
    for name, value in model.state_dict().items():
        wanted = torch.where(pruned[name], before[name], 0.0) if name in pruned else before[name]
        assert torch.equal(value, wanted), name
    assert model.training


def test_blocks_are_drawn_whole():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    masks = random_prune(model, 0.25, pattern="16x16", allocation="uniform")
    for mask in masks.values():
        assert Block(16, 16).is_satisfied(mask)
    assert counted(masks["0.weight"], 16) == 4
    assert counted(masks["2.weight"], 16) == 2


def counted(mask, side):
    return int(mask[::side, ::side].sum())


def test_random_masks_of_units_keep_exact_counts_of_units():
    model = nn.Conv2d(6, 10, 3)
    selection = select_parameters(model)
    masks = random_masks(selection, 0.4, pattern=aerogel.sparsity.Filter(), generator=seeded(0))
    kept = masks["weight"].flatten(1)
    assert int(kept.any(1).sum()) == 4
    assert torch.equal(kept.any(1), kept.all(1))
    with pytest.raises(ValueError, match="units"):
        random_masks(selection, 0.5, pattern=aerogel.sparsity.NM(2, 4))


def test_a_layer_allotted_less_than_one_weight_keeps_its_rows_alive():
    model = nn.Sequential(nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 4))
    share = {"0.weight": 0.01, "2.weight": 0.001}
    with pytest.warns(UserWarning, match=r"2\.weight.*0\.80 of 800 weights; it keeps 4"):
        masks = random_prune(model, None, allocation=share)
    assert masks["2.weight"].sum(1).tolist() == [1, 1, 1, 1]
    small = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 4))
    with pytest.warns(UserWarning, match="keeps 1"):
        masks = random_prune(small, None, allocation={"0.weight": 0.01, "2.weight": 0.01})
    assert int(masks["2.weight"].sum()) == 1


def test_the_report_shows_parameters_operations_and_dead_rows():
    model = net()
    masks = random_prune(model, 0.2)
    masks["6.weight"][1] = False
    report = layerwise_report(masks, model, torch.zeros(1, 1, 4, 4))
    dense = sparse = 0
    for line in report.layers:
        mask = masks[line.name]
        assert (line.shape, line.nnz) == (tuple(mask.shape), int(mask.sum()))
        assert line.density == pytest.approx(line.nnz / mask.numel())
        positions = 16 if line.name == "0.weight" else 1
        assert line.flops == (2 * positions * mask.numel(), 2 * positions * line.nnz)
        dense, sparse = dense + line.flops[0], sparse + line.flops[1]
    assert report.layers[-1].dead_rows >= 1
    assert report.density == masks.density()
    assert report.flops_ratio == pytest.approx(sparse / dense)
    assert report.flops_ratio > report.density  # ERK keeps the convolution denser
    for word in ("6.weight", "4x32", "dead rows", "operations left"):
        assert word in str(report)
    assert "operations" not in str(layerwise_report(masks))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.2}, "density"),
        ({"density": None}, "density=None"),
        ({"allocation": "erdos"}, "allocation"),
        ({"allocation": "snip"}, "loader and loss_fn"),
        ({"allocation": "grasp", "loader": SCORED["loader"]}, "loader and loss_fn"),
        ({"allocation": "snip", **SCORED, "loader": []}, "loader is empty"),
        ({"allocation": "grasp", **SCORED, "loader": []}, "loader is empty"),
        ({"allocation": "grasp", **SCORED, "loader": list(batches(1, 3))}, "at least 2 samples"),
        ({"allocation": {"0.weight": 0.5}}, "nothing for"),
        ({"allocation": {"0.weight": 0.5, "4.weigt": 0.5, "6.weight": 0.5}}, r"4\.weigt"),
        ({"allocation": {"0.weight": 0.5, "4.weight": 0.0, "6.weight": 0.5}}, r"4\.weight"),
        (
            {"allocation": {"0.weight": 0.5, "4.weight": 0.5, "6.weight": 0.5}},
            "density is 0.1, but the allocation keeps 0.5",
        ),
        ({"allocation": "uniform_plus", "density": 0.01}, "too small"),
        ({"pattern": "2:4"}, "units"),
        ({"pattern": "3x3"}, "weight"),
        ({"include": ("nothing",)}, "nothing"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        random_prune(net(), **{"density": 0.1, **options})


@pytest.mark.parametrize("allocation", ["snip", "grasp"])
def test_labels_out_of_range_are_named(allocation):
    x, y = SCORED["loader"][0]
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3"):
        random_prune(
            net(), 0.5, allocation=allocation, loader=[(x, y + 1)], loss_fn=F.cross_entropy
        )


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="no parameter selected"):
        random_prune(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), 0.5)


def test_a_static_trainer_refuses_what_it_cannot_hold():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="empty"):
        StaticSparseTrainer(model, optimizer, {})
    with pytest.raises(ValueError, match="shape"):
        StaticSparseTrainer(model, optimizer, {"4.weight": torch.ones(3, 3, dtype=torch.bool)})
    masks = random_prune(model, 0.5)
    trainer = StaticSparseTrainer(model, optimizer, masks)
    with pytest.raises(ValueError, match="another mask controller"):
        StaticSparseTrainer(model, optimizer, masks)
    trainer.finalize()


def test_reports_need_a_model_and_an_input_together():
    masks = random_prune(net(), 0.5)
    with pytest.raises(ValueError, match="together"):
        layerwise_report(masks, net())
    with pytest.raises(ValueError, match="empty"):
        layerwise_report({})


def test_a_pruned_network_compiles_to_the_same_outputs():
    model = net(width=64)
    masks = random_prune(model, 0.1)
    model.eval()
    x = torch.randn(8, 1, 4, 4)
    compiled = aerogel.compile(model, (x,))
    assert MaskSet.from_weights(model) == masks
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_training_on_the_stored_weights_alone_is_the_same_training():
    def prepared():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        return model, random_prune(model, 0.1, allocation="uniform")

    masked, masks = prepared()
    optimizer = torch.optim.SGD(masked.parameters(), 0.1, momentum=0.9)
    stepper = StaticSparseTrainer(masked, optimizer, masks)
    stored, _ = prepared()
    stored = sparse_training(stored, min_sparsity=0.0, masks=masks)
    own = torch.optim.SGD(stored.parameters(), 0.1, momentum=0.9)
    for x, y in SCORED["loader"]:
        for model, zero, step in ((masked, optimizer, stepper), (stored, own, own)):
            zero.zero_grad()
            F.cross_entropy(model(x.flatten(1)), y).backward()
            step.step()
    dense = to_dense(stored)
    for (name, a), b in zip(masked.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
