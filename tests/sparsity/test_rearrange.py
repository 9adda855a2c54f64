import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aerogel.models import create_model
from aerogel.sparsity import (
    Filter,
    KernelGroup,
    KernelPattern,
    Unstructured,
    build_masks,
    compute_scores,
    select_parameters,
)
from aerogel.sparsity.rearrange import apply_plan, invert_plan, plan_rearrangement


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs, affine=False)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 22, 2), Residual(22, 22, 1))
        self.fc = nn.Linear(22, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.a, self.b = nn.Conv2d(8, 12, 1), nn.Conv2d(8, 16, 3, padding=1)
        self.depthwise, self.mix = nn.Conv2d(28, 28, 3, padding=1, groups=28), nn.Conv2d(28, 16, 1)
        self.gate = nn.Linear(16, 16)
        self.fc = nn.Linear(44, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        both = torch.cat([self.a(x), self.b(x)], 1)
        mixed = self.mix(F.relu(self.depthwise(both)))
        mixed = mixed * torch.sigmoid(self.gate(mixed.mean((2, 3))))[:, :, None, None]
        return self.fc(torch.cat([both, mixed], 1).mean((2, 3)))


NETWORKS = {
    "mobilenet v1": (lambda: create_model("mobilenet_v1_laptop"), (2, 1, 28, 28)),
    "mobilenet v2": (lambda: create_model("mobilenetv2_laptop"), (2, 1, 28, 28)),
    "resnet": (ResNet, (2, 3, 9, 9)),
    "concatenated": (Concatenated, (2, 3, 9, 9)),
}


def network(name):
    """With values in which a wrong order shows."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model = build().eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.dim() < 2:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model, torch.randn(shape)


def patterns_of(model, group=4):
    refs = select_parameters(model, types=(nn.Conv2d, nn.Linear))
    return {
        name: KernelGroup(group)
        for name, ref in refs.items()
        if getattr(ref.module, "groups", 1) == 1 and group <= ref.shape[0] and ref.shape[1] > 1
    }


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_rearranged_network_computes_the_same_and_can_be_put_back(name, balanced):
    model, x = network(name)
    wanted, before = model(x), copy.deepcopy(model.state_dict())
    patterns = patterns_of(model)
    plan = plan_rearrangement(model, x, patterns, 0.5, balanced=balanced)
    assert plan.classes
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    apply_plan(model, plan)
    assert any(not torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert (model(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    apply_plan(model, invert_plan(plan))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def pruned_energy(model, patterns, scope="layer"):
    selection = select_parameters(model, include=tuple(patterns))
    densities = {name: pattern.fixed_density or 0.5 for name, pattern in patterns.items()}
    masks = build_masks(compute_scores(selection, "magnitude"), densities, patterns, scope)
    weights = {name: ref.parameter.detach().double() for name, ref in selection.items()}
    return {name: float((w * masks[name]).square().sum()) for name, w in weights.items()}


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_pruning_keeps_what_the_plan_says_and_more_than_before(name, balanced):
    model, x = network(name)
    patterns = patterns_of(model)
    scope = "row" if balanced else "layer"
    plan = plan_rearrangement(model, x, patterns, 0.5, balanced=balanced)
    before = pruned_energy(model, patterns, scope)
    apply_plan(model, plan)
    after = pruned_energy(model, patterns, scope)
    for each, was, now in zip(
        plan.classes, plan.kept_energy_before, plan.kept_energy_after, strict=True
    ):
        assert now > was
        names = [axis.name for axis in each.producers if axis.name in patterns]
        total = sum(float(model.get_parameter(n).detach().double().square().sum()) for n in names)
        whole = all(axis.shape[0] == each.size for axis in each.producers)
        if whole:  # a layer that belongs to one class alone
            assert sum(before[n] for n in names) == pytest.approx(was * total, rel=1e-6)
            assert sum(after[n] for n in names) == pytest.approx(now * total, rel=1e-6)


def test_energy_falls_as_more_weights_share_their_fate():
    model, x = network("mobilenet v1")
    patterns = {n: p for n, p in patterns_of(model, 16).items() if "classifier" not in n}

    def kept(pattern):
        return sum(pruned_energy(model, dict.fromkeys(patterns, pattern)).values())

    plain = [kept(p) for p in (Unstructured(), KernelGroup(4), KernelGroup(16), Filter())]
    apply_plan(model, plan_rearrangement(model, x, dict.fromkeys(patterns, KernelGroup(4)), 0.5))
    energies = [plain[0], kept(KernelGroup(4)), *plain[1:]]
    assert energies == sorted(energies, reverse=True)


def test_channels_added_together_share_one_order_and_all_producers_count():
    model, x = network("resnet")
    plan = plan_rearrangement(model, x, patterns_of(model), 0.5)
    produced = [{axis.name for axis in each.producers} for each in plan.classes]
    assert {"stem.weight", "blocks.0.conv2.weight"} in produced
    assert {
        "blocks.1.conv2.weight", "blocks.1.skip.weight", "blocks.2.conv2.weight",
    } in produced  # fmt: skip


def test_shared_depthwise_patterns_take_part_in_the_order():
    model, x = network("mobilenet v2")
    depthwise = {
        name: KernelPattern(group=4)
        for name, ref in select_parameters(model).items()
        if getattr(ref.module, "groups", 1) > 1
    }
    plan = plan_rearrangement(model, x, depthwise, 1.0)
    before = pruned_energy(model, depthwise)
    apply_plan(model, plan)
    after = pruned_energy(model, depthwise)
    assert len(plan.classes) > 1
    for each in plan.classes:
        (name,) = (axis.name for axis in each.producers if axis.name in depthwise)
        assert after[name] > before[name]


def test_masks_and_averages_follow_a_plan():
    model, x = network("resnet")
    patterns = patterns_of(model)
    selection = select_parameters(model, include=tuple(patterns))
    masks = build_masks(compute_scores(selection, "magnitude"), 0.5, patterns)
    pruned = copy.deepcopy(model)
    masks.apply_(pruned)
    plan = plan_rearrangement(model, x, patterns, 0.5)
    apply_plan(model, plan)
    apply_plan(pruned, plan)
    moved = dict(masks)
    apply_plan(moved, plan)
    for name, mask in moved.items():
        weight = model.get_parameter(name)
        assert torch.equal(weight * mask, pruned.get_parameter(name))


def test_a_plan_is_refused_by_another_network():
    model, x = network("resnet")
    plan = plan_rearrangement(model, x, patterns_of(model), 0.5)
    other, _ = network("concatenated")
    with pytest.raises(ValueError, match="made for another network than this Concatenated"):
        apply_plan(other, plan)


def test_permutations_of_the_wrong_length_change_nothing():
    model, x = network("resnet")
    plan = plan_rearrangement(model, x, patterns_of(model), 0.5)
    before = copy.deepcopy(model.state_dict())
    for wrong in (torch.arange(3), torch.zeros(plan.classes[-1].size, dtype=torch.int64)):
        bad = dataclasses.replace(plan, permutations=(*plan.permutations[:-1], wrong))
        with pytest.raises(ValueError, match="must reorder its"):
            apply_plan(model, bad)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_plans_depend_on_the_seed_alone():
    model, x = network("mobilenet v1")
    first, again = (plan_rearrangement(model, x, patterns_of(model), 0.5, seed=3) for _ in "ab")
    for one, two in zip(first.permutations, again.permutations, strict=True):
        assert torch.equal(one, two)
    assert first.kept_energy_after == again.kept_energy_after
