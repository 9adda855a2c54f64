import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aerogel import runtime
from aerogel.models import create_model
from aerogel.pruning import (
    GroupKernelConfig,
    GroupKernelPruner,
    apply_plan,
    group_kernel_prune,
    rearrange_network,
)
from aerogel.pruning.callbacks import PrunerCallback
from aerogel.pruning.sparsebytenn import kernel_group_patterns, layer_rates, sparsebytenn
from aerogel.sparsity import Cubic, Frozen, Geometric, KernelGroup, KernelPattern, kept_count

IMAGE = torch.zeros(1, 3, 8, 8)


def network(channels=(16, 22), classes=5):
    """Stem, 3x3, depthwise, 1x1, classifier; 22 channels are not a multiple of 4."""
    torch.manual_seed(0)
    a, b = channels
    return nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1, bias=False), nn.BatchNorm2d(a), nn.ReLU(),
        nn.Conv2d(a, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a, affine=False), nn.ReLU(),
        nn.Conv2d(a, a, 3, padding=1, groups=a), nn.BatchNorm2d(a), nn.ReLU(),
        nn.Conv2d(a, b, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(b, 12), nn.ReLU(), nn.Linear(12, classes),
    )  # fmt: skip


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.randint(
        5, (16,), generator=generator
    )


def fine_tune(model, stepper, steps, start=0):
    for step in range(start, start + steps):
        images, labels = batch(step)
        stepper.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        stepper.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


def test_the_stem_depthwise_filters_and_the_classifier_stay_dense():
    patterns = kernel_group_patterns(network(), GroupKernelConfig())
    assert patterns == {
        "3.weight": KernelGroup(4), "9.weight": KernelGroup(4), "13.weight": KernelGroup(4),
    }  # fmt: skip
    v1 = kernel_group_patterns(create_model("mobilenet_v1_laptop"), GroupKernelConfig())
    assert len(v1) == 5
    assert all(name.endswith(".1.0.weight") for name in v1)


def test_kinds_of_layers_are_chosen_one_by_one():
    config = GroupKernelConfig(group=8, patterns={"conv1x1": "dense", "depthwise": "pattern"})
    assert config.patterns["conv3x3"] == "group"
    assert kernel_group_patterns(network(), config) == {
        "3.weight": KernelGroup(8), "6.weight": KernelPattern(group=8),
    }  # fmt: skip


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8])
def test_masks_are_whole_groups_of_exact_count(group, sparsity, balanced):
    model = network()
    config = GroupKernelConfig(group, sparsity, balanced, exclude=("13",))
    masks = group_kernel_prune(model, config)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        kernels = mask.flatten(2)
        assert torch.equal(kernels.all(2), kernels.any(2))
        blocks = kernels.any(2).split(group)
        assert all(torch.equal(part.all(0), part.any(0)) for part in blocks)
        kept = [int(part.any(0).sum()) for part in blocks]
        columns = mask.shape[1]
        units = columns if balanced else len(blocks) * columns
        wanted = kept_count(units, 1 - sparsity, rounding="round_kept")
        assert set(kept) == {wanted} if balanced else sum(kept) == wanted


def test_depthwise_kernels_keep_four_taps_that_a_group_shares():
    model = network()
    config = GroupKernelConfig(sparsity=0.5, patterns={"depthwise": "pattern"})
    mask = group_kernel_prune(model, config)["6.weight"]
    assert KernelPattern(group=4).is_satisfied(mask, exact=True)
    assert all(torch.equal(part, part[:1].expand_as(part)) for part in mask.split(4))
    assert bool(mask[:, 0, 1, 1].all())


def test_rates_set_layers_apart():
    config = GroupKernelConfig(sparsity=0.5, rates={"3.weight": 0.75})
    model = network()
    masks = group_kernel_prune(model, config)
    assert float(masks["3.weight"].float().mean()) == pytest.approx(0.25)
    assert float(masks["9.weight"].float().mean()) == pytest.approx(0.5, abs=0.05)
    model = network()
    pruner = GroupKernelPruner(model, sgd(model), config, steps=8)
    fine_tune(model, pruner, 8)
    found = pruner.finalize()
    assert {n: int(m.sum()) for n, m in found.items()} == {
        n: int(m.sum()) for n, m in masks.items()
    }


def test_rates_by_cost_save_the_time_asked_for_where_it_is_cheapest():
    model, config = network(), GroupKernelConfig(sparsity=0.5)
    equal = layer_rates(model, config, {"3.weight": 1.0, "9.weight": 1.0, "13.weight": 1.0})
    seconds = {"3.weight": 8.0, "9.weight": 1.0, "13.weight": 1.0, "0.weight": 5.0}
    rates = layer_rates(model, config, seconds)
    assert set(rates) == set(kernel_group_patterns(model, config))
    assert rates["3.weight"] > equal["3.weight"]
    saved = sum(rate * seconds[name] for name, rate in rates.items())
    assert 5.0 - 8.0 / 64 < saved <= 5.0  # a group of kernels of the first takes 8 / 64
    assert max(rates.values()) <= 0.9
    masks = group_kernel_prune(model, dataclasses.replace(config, rates=rates))
    assert float(masks["3.weight"].float().mean()) == pytest.approx(1 - rates["3.weight"])
    with pytest.raises(ValueError, match=r"seconds of '9.weight' must be given"):
        layer_rates(network(), config, {"3.weight": 1.0})
    with pytest.raises(ValueError, match="density must be in"):
        layer_rates(network(), config, seconds, most=0.4)


def test_pruning_by_a_schedule_of_ones_own_never_revives():
    model, config = network(), GroupKernelConfig(sparsity=0.6)
    schedule = Geometric(0.6, 3)
    masks = [group_kernel_prune(model, config, schedule, step) for step in range(4)]
    assert masks[0].density() == 1.0
    for earlier, later in itertools.pairwise(masks):
        assert all(bool((earlier[n] | ~later[n]).all()) for n in later)
    assert masks[-1].sparsity() == pytest.approx(0.6, abs=0.02)


def test_rearranged_networks_compute_the_same_and_lose_less():
    model = network()
    x, wanted = batch()[0], None
    with torch.no_grad():
        wanted = model.eval()(x)
    config = GroupKernelConfig(sparsity=0.5)
    plain = copy.deepcopy(model)
    plan = rearrange_network(model, IMAGE, config)
    apply_plan(model, plan)
    with torch.no_grad():
        assert torch.allclose(model(x), wanted, atol=1e-5)
    group_kernel_prune(model, config)
    group_kernel_prune(plain, config)
    names = list(kernel_group_patterns(plain, config))
    kept = [
        sum(float(m.get_parameter(n).detach().square().sum()) for n in names)
        for m in (model, plain)
    ]
    assert kept[0] > kept[1]
    assert all(a > b for a, b in zip(plan.kept_energy_after, plan.kept_energy_before, strict=True))


def test_the_ramp_ends_halfway_and_masked_weights_may_return_until_then():
    model = network()
    config = GroupKernelConfig(sparsity=0.5)
    pruner = GroupKernelPruner(model, sgd(model), config, steps=40)
    assert (pruner.schedule.begin, pruner.schedule.end) == (0, 20)
    seen = []
    for step in range(40):
        fine_tune(model, pruner, 1, step)
        seen.append(pruner.masks.clone())
    assert [round(m.sparsity(), 2) for m in seen[20:]] == [0.5] * 20
    assert sorted(m.sparsity() for m in seen) == [m.sparsity() for m in seen]
    assert all(m == seen[20] for m in seen[20:])
    masks = pruner.finalize()
    assert not any("parametrizations" in name for name in model.state_dict())
    assert all(torch.equal(model.get_parameter(n) != 0, m) for n, m in masks.items())


def test_one_shot_prunes_with_the_first_step_and_keeps_its_zeros():
    model = network()
    config = GroupKernelConfig(sparsity=0.5)
    pruner = GroupKernelPruner(model, sgd(model), config, steps=5, schedule="one-shot")
    fine_tune(model, pruner, 1)
    masks = pruner.masks.clone()
    assert masks.sparsity() == pytest.approx(0.5, abs=0.02)
    fine_tune(model, pruner, 4, 1)
    assert pruner.finalize() == masks


def test_resuming_is_bit_identical():
    config = GroupKernelConfig(sparsity=0.5, patterns={"depthwise": "pattern"})

    def start():
        model = network()
        optimizer = sgd(model)
        return model, optimizer, GroupKernelPruner(model, optimizer, config, steps=12)

    model, _, pruner = start()
    fine_tune(model, pruner, 12)
    first, optimizer, half = start()
    fine_tune(first, half, 5)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), half.state_dict()))
    again, other, resumed = start()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    fine_tune(again, resumed, 7, 5)
    assert pruner.finalize() == resumed.finalize()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_callback_leaves_a_plain_sparse_network():
    model = network()
    config = GroupKernelConfig(sparsity=0.5)
    callback = PrunerCallback(
        lambda m, o: GroupKernelPruner(m, o, config, steps=6, coupling=Frozen(in_place=True))
    )

    class Run:
        pass

    run = Run()
    run.model, run.optimizer = model, sgd(model)
    callback.on_train_begin(run)
    for step in range(6):
        images, labels = batch(step)
        run.optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        run.optimizer.step()
        callback.on_optimizer_step(run)
    callback.on_train_end(run)
    for name in kernel_group_patterns(model, config):
        assert KernelGroup(4).is_satisfied(model.get_parameter(name) != 0)


def test_the_whole_method_rearranges_prunes_and_trains():
    model = network()
    config = GroupKernelConfig(sparsity=0.5)

    def train(model, wrap):
        fine_tune(model, wrap(model, sgd(model)), 10)

    result = sparsebytenn(model, train, config, steps=10, example=IMAGE)
    assert result.model is model
    assert result.plan is not None
    assert len(result.plan.classes) == 3
    assert result.masks.sparsity() == pytest.approx(0.5, abs=0.02)
    assert all(torch.equal(model.get_parameter(n) != 0, m) for n, m in result.masks.items())


def test_a_loop_that_ignores_the_pruner_is_told():
    with pytest.raises(RuntimeError, match="never called wrap"):
        sparsebytenn(network(), lambda m, wrap: None, GroupKernelConfig(), steps=3, example=IMAGE)
    with pytest.raises(ValueError, match="example is needed"):
        sparsebytenn(network(), lambda m, wrap: None, GroupKernelConfig(), steps=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 0}, "group must be at least 1, got 0"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"rates": {"3.weight": -0.1}}, r"rates\['3.weight'\] must be in"),
        ({"sparsity": 0.0, "rates": {"3.weight": 0.1}}, "rates need a sparsity above 0"),
        ({"patterns": {"conv3x3": "pattern"}}, r"patterns\['conv3x3'\] must be one of"),
        ({"patterns": {"conv5x5": "group"}}, "unknown kind of layer 'conv5x5'; nearest: conv3x3"),
    ],
)
def test_configs_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GroupKernelConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 17}, "kernel group 17 is larger than the 16 output channels of '3.weight'"),
        ({"sparsity": 0.999}, "sparsity 0.999 leaves nothing of '3.weight', which has 64 groups"),
        ({"rates": {"0.weight": 0.5}}, "rates: unknown pruned weight '0.weight'"),
        ({"include": ("6",)}, "nothing to prune"),
    ],
)
def test_configs_that_do_not_fit_the_network_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        group_kernel_prune(network(), GroupKernelConfig(**options))


def test_grouped_convolutions_are_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match=r"'1\.weight' is a convolution with 2 groups"):
        group_kernel_prune(model, GroupKernelConfig())
    masks = group_kernel_prune(model, GroupKernelConfig(exclude=("1",)))
    assert list(masks) == ["2.weight"]


def test_weights_that_are_not_finite_are_named():
    model = network()
    with torch.no_grad():
        model[9].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'9\.weight' has 1 nan"):
        group_kernel_prune(model, GroupKernelConfig())


def test_compiled_and_masked_models_are_refused():
    model = network()
    pruner = GroupKernelPruner(model, sgd(model), GroupKernelConfig(), steps=4)
    with pytest.raises(ValueError, match=r"'3\.weight' is masked or parametrized already"):
        rearrange_network(model, IMAGE, GroupKernelConfig())
    fine_tune(model, pruner, 4)
    pruner.finalize()
    compiled = runtime.CompiledModule(model, None, None)
    with pytest.raises(ValueError, match="prune it, then compile it"):
        group_kernel_prune(compiled, GroupKernelConfig())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return self.body(x) if bool(x.sum() > 1e9) else self.body(x) * 2


def test_networks_that_cannot_be_traced_keep_their_order_with_a_warning():
    model = Branching()
    with pytest.warns(UserWarning, match=r"channels keep their order: .*test_sparsebytenn.py"):
        plan = rearrange_network(model, IMAGE, GroupKernelConfig())
    assert plan.classes == ()
    before = copy.deepcopy(model.state_dict())
    apply_plan(model, plan)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_examples_that_do_not_run_are_an_error():
    with pytest.raises(ValueError, match="does not run on the example"):
        rearrange_network(network(), torch.zeros(1, 4, 8, 8), GroupKernelConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 1}, "leave no room for a ramp"),
        ({"steps": 9, "schedule": "linear"}, "schedule must be 'cubic'"),
        ({"steps": 9, "schedule": Cubic(0, 0.9, 0, 2, 2)}, "ends at sparsity 0.9, expected 0.3"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(arguments, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        GroupKernelPruner(model, sgd(model), GroupKernelConfig(), **arguments)
