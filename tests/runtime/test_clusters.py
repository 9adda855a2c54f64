"""sparsify_convs: the rule of two thirds by cluster, or measurement; right outputs always."""

from __future__ import annotations

import pytest
import torch
from fakes import clock
from torch import nn

from aerogel import models
from aerogel.runtime import XNNPACK_THRESHOLD, Cluster, compiler, sparsify_convs
from aerogel.runtime.clusters import BY_RULE
from aerogel.runtime.strategies import EAGER
from aerogel.sparsity import build_masks, compute_scores, select_parameters


@pytest.fixture(autouse=True)
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed: sparse kernels and native plans win."""
    original = compiler.Settings

    def settings(**kwargs: object) -> compiler.Settings:
        return original(**{"measure": clock("native plans"), "race": clock("spmm"), **kwargs})

    monkeypatch.setattr("aerogel.runtime.clusters.Settings", settings)


def pruned(sparsity: float, name: str = "mobilenet_v1_laptop", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model = models.create_model(name, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    if sparsity:
        layers = [f"{target}.weight" for target, _ in model.prune_targets()]
        scores = compute_scores(select_parameters(model, include=layers), "magnitude")
        build_masks(scores, 1.0 - sparsity).apply_(model)
    return model


SMALL = {"blocks": ((16, 1), (32, 2), (32, 1)), "stem_chs": 8}
IMAGE = torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(1))


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).abs().max() <= 1e-4 * expected.abs().max())


@pytest.mark.parametrize(
    ("sparsity", "decision"), [(0.5, "dense"), (0.66, "dense"), (0.67, "sparse"), (0.9, "sparse")]
)
@torch.no_grad()
def test_a_cluster_is_sparse_where_more_than_two_thirds_are_zero(
    sparsity: float, decision: str
) -> None:
    model = pruned(sparsity, **SMALL)
    fast = sparsify_convs(model, IMAGE, threshold=XNNPACK_THRESHOLD, cache=False)
    (note,) = [note for note in fast.explain().notes if note.startswith("cluster")]
    assert note.endswith(decision)
    assert "in 3 1x1" in note
    rows = {row.layer: row.kernel for row in fast.explain().rows}
    assert ("spmm" in rows["features.2.1.0"]) == (decision == "sparse")
    assert fast.explain().chosen == BY_RULE
    assert close(fast(IMAGE), model(IMAGE))


def test_exactly_two_thirds_are_not_more() -> None:
    cluster = Cluster(("a",), 300, 200)
    assert cluster.sparsity == pytest.approx(XNNPACK_THRESHOLD)
    assert not cluster.sparsity > XNNPACK_THRESHOLD
    assert str(cluster) == "cluster a: 66.7% of 300 weights in 1 1x1"


class TwoTrunks(nn.Module):
    """Two clusters, apart because torch alone can do what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.second = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Hardswish(), nn.Conv2d(16, 8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).cumsum(2))


@torch.no_grad()
def test_each_cluster_is_judged_for_itself() -> None:
    torch.manual_seed(0)
    model = TwoTrunks().eval()
    for name, sparsity in (("first.0", 0.95), ("first.2", 0.4), ("second.0", 0.9)):
        weight = model.get_submodule(name).weight
        weight *= torch.rand(weight.shape) >= sparsity
    x = torch.randn(1, 8, 6, 7)
    fast = sparsify_convs(model, x, threshold=0.5, cache=False)
    notes = [note for note in fast.explain().notes if note.startswith("cluster")]
    assert [note.rpartition(", ")[2] for note in notes] == ["sparse", "sparse"]
    assert [note.split(":")[0] for note in notes] == [
        "cluster first.0 .. first.2",
        "cluster second.0 .. second.2",
    ]
    fast = sparsify_convs(model, x, threshold=0.59, cache=False)
    decisions = [n.rpartition(", ")[2] for n in fast.explain().notes if n.startswith("cluster")]
    assert sorted(decisions) == ["dense", "sparse"]
    assert close(fast(x), model(x))


@torch.no_grad()
def test_squeeze_excite_runs_in_the_plan_and_does_not_vote() -> None:
    model = pruned(0.8, "efficientnet_laptop")
    x = torch.randn(1, 1, 28, 28)
    fast = sparsify_convs(model, x, threshold=XNNPACK_THRESHOLD, cache=False)
    (note,) = [note for note in fast.explain().notes if note.startswith("cluster")]
    targets = [name for name, _ in model.prune_targets()]
    weights = sum(model.get_submodule(name).weight.numel() for name in targets)
    assert f"80.0% of {weights:,} weights in {len(targets)} 1x1" in note
    assert all("plan 0" in row.kernel for row in fast.explain().rows)
    assert close(fast(x), model(x))


@pytest.mark.parametrize("slow", ["native plans", EAGER])
def test_measuring_keeps_what_is_fastest(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    model = pruned(0.5, **SMALL)
    original = compiler.Settings

    def settings(**kwargs: object) -> compiler.Settings:
        return original(**{**kwargs, "measure": clock(slow), "race": clock("spmm")})

    monkeypatch.setattr("aerogel.runtime.clusters.Settings", settings)
    fast = sparsify_convs(model, IMAGE, cache=False)
    assert fast.explain().chosen == slow  # the clock's favourite takes half of the others' time
    assert any(note.startswith("cluster") for note in fast.explain().notes)


def test_a_network_without_1x1_convolutions_has_no_clusters() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).eval()
    fast = sparsify_convs(model, IMAGE, threshold=0.0, cache=False)
    assert not any(note.startswith("cluster") for note in fast.explain().notes)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if float(x.sum()) > 0 else -self.conv(x)


def test_a_rule_needs_a_graph() -> None:
    with (
        pytest.warns(UserWarning, match="module by module"),
        pytest.raises(ValueError, match="'sparse clusters' is not available for this model"),
    ):
        sparsify_convs(DataDependent().eval(), IMAGE, threshold=0.5, cache=False)


@pytest.mark.parametrize("threshold", [1.5, -0.1, "always", None, float("nan")])
def test_bad_thresholds_are_named(threshold: object) -> None:
    with pytest.raises(ValueError, match="expected 'measure' or a share"):
        sparsify_convs(pruned(0.5, **SMALL), IMAGE, threshold=threshold)  # type: ignore[arg-type]


def test_models_and_threads_are_checked() -> None:
    with pytest.raises(TypeError, match="model must be a torch"):
        sparsify_convs("mobilenet", IMAGE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads must be at least 1"):
        sparsify_convs(pruned(0.5, **SMALL), IMAGE, threads=0)
