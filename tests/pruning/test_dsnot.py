"""DSnoT swaps kept for pruned weights as the paper says, and keeps its promises to the mask."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aerogel.pruning import dsnot_, magnitude_, refine_mask, sparsegpt_, wanda_
from aerogel.sparsity import NM, MaskSet, wanda_mask
from aerogel.sparsity.input_stats import InputStats
from aerogel.sparsity.oneshot import row_mask


def inputs(samples: int, tokens: int, features: int, seed: int = 0) -> Tensor:
    """(samples, tokens, features) with means, scales and correlations as activations have them."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(max(2, features // 3), features, generator=generator)
    x = torch.randn(samples, tokens, basis.shape[0], generator=generator) @ basis
    scale = torch.rand(features, generator=generator) + 0.1
    return x * scale + 0.5 * torch.randn(features, generator=generator)


def layer_of(rows: int, features: int, seed: int = 0) -> tuple[nn.Linear, InputStats]:
    torch.manual_seed(seed)
    layer = nn.Linear(features, rows)
    stats = InputStats(layer, "weight")
    stats.update(inputs(4, 8, features, seed))
    return layer, stats.finish()


def start_of(weight: Tensor, stats: InputStats, sparsity: float, kind: str = "wanda") -> Tensor:
    if kind == "wanda":
        return wanda_mask(weight, stats, sparsity)
    return row_mask(weight.abs(), sparsity)


def expected_error(weight: Tensor, mask: Tensor, stats: InputStats) -> Tensor:
    return (weight * stats.signed_mean).masked_fill(mask, 0.0).sum(1)


def oracle_row(w, mask, mu, norm, var, nm=None, ranking=None, power=1.0, cycles=50, eps=0.1,
               keep_sign=False):  # fmt: skip
    """One row, one pointer move at a time, in plain Python from the paper's algorithm."""
    columns = range(len(w))
    c = [float(w[j] * mu[j]) for j in columns]
    gain = [c[j] / float(max(var[j], 1e-12)) ** power if power else c[j] for j in columns]
    wanda = [abs(float(w[j] * norm[j])) for j in columns]
    mask = [bool(k) for k in mask]
    start = list(mask)
    pruned = [j for j in columns if not mask[j]]
    error = initial = sum(c[j] for j in pruned)
    growth = sorted(pruned, key=lambda j: gain[j])
    bottom, top = 0, len(growth) - 1
    queues = {
        sign: sorted((j for j in columns if mask[j] and sign * c[j] > 0), key=lambda j: wanda[j])
        for sign in (1, -1)
    }
    ranking = list(wanda if ranking is None else map(float, ranking))
    for _ in range(cycles):
        if abs(error) <= eps or top < bottom:
            break
        sign = 1 if error > 0 else -1
        g = growth[top] if sign > 0 else growth[bottom]
        if mask[g] or sign * c[g] <= 0:
            break
        if nm is None:
            if not queues[-sign]:
                break
            q = queues[-sign].pop(0)
        else:
            group = range(g // nm * nm, g // nm * nm + nm)
            partners = [j for j in group if mask[j] and ranking[j] < math.inf]
            if not partners:
                break
            q = min(partners, key=lambda j: ranking[j])
        after = error + c[q] - c[g]
        if keep_sign and after * initial < 0:
            break
        top, bottom = (top - 1, bottom) if sign > 0 else (top, bottom + 1)
        error, mask[g], mask[q] = after, True, False
        ranking[g] = math.inf  # a regrown weight is never chosen for pruning
    return torch.tensor(start if keep_sign and abs(error) > abs(initial) else mask)


def oracle(weight, mask, stats, **options):
    vectors = (stats.signed_mean, stats.norm, stats.var)
    ranking = options.pop("score", None)
    return torch.stack(
        [
            oracle_row(w, m, *vectors, ranking=None if ranking is None else ranking[i], **options)
            for i, (w, m) in enumerate(zip(weight, mask, strict=True))
        ]
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    features=st.integers(2, 40),
    sparsity=st.floats(0, 0.9),
    kind=st.sampled_from(["wanda", "magnitude"]),
    power=st.sampled_from([0.0, 0.5, 1.0]),
    keep_sign=st.booleans(),
    cycles=st.sampled_from([0, 1, 7, 50]),
    seed=st.integers(0, 1000),
)
def test_all_rows_at_once_equal_one_row_at_a_time(
    rows, features, sparsity, kind, power, keep_sign, cycles, seed
):
    layer, stats = layer_of(rows, features, seed)
    weight = layer.weight.detach()
    mask = start_of(weight, stats, sparsity, kind)
    found = refine_mask(
        weight, mask, stats, var_power=power, keep_sign=keep_sign, max_cycles=cycles
    )
    wanted = oracle(weight, mask, stats, power=power, keep_sign=keep_sign, cycles=cycles)
    assert torch.equal(found, wanted)
    assert torch.equal(found.sum(1), mask.sum(1))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 8),
    nm=st.sampled_from([(2, 4), (1, 4), (4, 8)]),
    magnitude_start=st.booleans(),
    keep_sign=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_groups_at_once_equal_one_group_at_a_time(
    rows, groups, nm, magnitude_start, keep_sign, seed
):
    layer, stats = layer_of(rows, groups * nm[1], seed)
    weight = layer.weight.detach()
    score = weight.abs() if magnitude_start else weight.abs() * stats.norm
    mask = row_mask(score, 1 - nm[0] / nm[1], NM(*nm))
    found = refine_mask(weight, mask, stats, pattern=NM(*nm), score=score, keep_sign=keep_sign)
    wanted = oracle(weight, mask, stats, nm=nm[1], score=score, keep_sign=keep_sign)
    assert torch.equal(found, wanted)
    assert NM(*nm).is_satisfied(found, exact=True)


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
@pytest.mark.parametrize("seed", range(5))
def test_no_row_gets_worse_when_the_sign_is_kept(pattern, seed):
    layer, stats = layer_of(64, 128, seed)
    weight = layer.weight.detach()
    mask = wanda_mask(weight, stats, 0.5, NM(2, 4)) if pattern else start_of(weight, stats, 0.5)
    if pattern == "4:8":
        mask = wanda_mask(weight, stats, 0.5, NM(4, 8))
    found = refine_mask(weight, mask, stats, pattern=pattern, keep_sign=True)
    before, after = (expected_error(weight, m, stats).abs() for m in (mask, found))
    assert bool((after <= before + 1e-5).all())
    untouched = before <= 0.1
    assert torch.equal(found[untouched], mask[untouched])


@pytest.mark.parametrize("kind", ["wanda", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_the_expected_error_falls_by_four_fifths(kind, sparsity):
    layer, stats = layer_of(128, 256, seed=3)
    weight = layer.weight.detach()
    mask = start_of(weight, stats, sparsity, kind)
    found = refine_mask(weight, mask, stats)
    before, after = (expected_error(weight, m, stats).abs().mean() for m in (mask, found))
    assert float(after) <= 0.2 * float(before)


def test_permuting_the_inputs_permutes_the_mask():
    layer, stats = layer_of(16, 48)
    weight, x = layer.weight.detach(), inputs(4, 8, 48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    twin = InputStats(layer, "weight")
    twin.update(x[..., order])
    mask = start_of(weight, stats, 0.6)
    found = refine_mask(weight, mask, stats)
    assert torch.equal(refine_mask(weight[:, order], mask[:, order], twin), found[:, order])


def test_without_its_power_the_variance_is_not_read():
    layer, full = layer_of(16, 48)
    bare = InputStats(layer, "weight", ["sum", "sumsq"])
    bare.update(inputs(4, 8, 48))
    weight = layer.weight.detach()
    mask = start_of(weight, full, 0.6)
    found = refine_mask(weight, mask, bare, var_power=0.0)
    assert torch.equal(found, refine_mask(weight, mask, full, var_power=0.0))
    assert not torch.equal(found, refine_mask(weight, mask, full))
    with pytest.raises(ValueError, match="'var' was not collected"):
        refine_mask(weight, mask, bare)


def test_the_variance_is_that_within_sequences_or_the_pooled_one():
    torch.manual_seed(0)
    layer = nn.Linear(48, 16)
    stats = InputStats(layer, "weight")
    shift = torch.randn(6, 1, 48) * torch.rand(48) * 4  # sequences differ more than their tokens
    stats.update(inputs(6, 8, 48) + shift)
    weight = layer.weight.detach()
    mask = start_of(weight, stats, 0.6)
    within, pooled = (refine_mask(weight, mask, stats, var=var) for var in ("within", "pooled"))
    assert not torch.equal(within, pooled)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_narrow_layers_run_out_of_candidates_and_stop(sparsity):
    layer, stats = layer_of(40, 16, seed=2)
    weight = layer.weight.detach() * 30  # errors that no swap can repair
    mask = start_of(weight, stats, sparsity)
    found = refine_mask(weight, mask, stats, max_cycles=50)
    assert torch.equal(found.sum(1), mask.sum(1))
    assert torch.equal(found, oracle(weight, mask, stats))


def test_a_feature_that_is_always_zero_is_never_grown():
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 32), inputs(4, 8, 24)
    x[..., 5], x[..., 7] = 0.0, 2.0  # a dead feature, and a constant one of variance 0
    stats = InputStats(layer, "weight")
    stats.update(x)
    weight = layer.weight.detach()
    mask = start_of(weight, stats, 0.6)
    found = refine_mask(weight, mask, stats)
    assert not bool(mask[:, 5].any())
    assert not bool(found[:, 5].any())
    assert torch.equal(found.sum(1), mask.sum(1))


def test_convolutions_are_refined_as_their_unfolded_matrix():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, padding=1)
    stats = InputStats(conv, "weight")
    stats.update(torch.rand(5, 8, 9, 9) * torch.rand(8, 1, 1))
    weight = conv.weight.detach()
    mask = wanda_mask(weight, stats, 0.6)
    found = refine_mask(weight, mask, stats)
    assert torch.equal(found.flatten(1), oracle(weight.flatten(1), mask.flatten(1), stats))
    mask = wanda_mask(weight, stats, 0.5, NM(2, 4))
    found = refine_mask(weight, mask, stats, pattern="2:4")
    assert NM(2, 4).is_satisfied(found, exact=True)
    assert not torch.equal(found, mask)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Linear(width, width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(torch.relu(self.attention(x)))


class Stack(nn.Module):
    def __init__(self, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack(seed: int = 0) -> tuple[Stack, list[Tensor]]:
    torch.manual_seed(seed)
    return Stack(), [inputs(3, 7, 24, seed + i) for i in range(3)]


@pytest.mark.parametrize("start", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_kept_weights_are_bitwise_the_dense_ones(start, pattern):
    model, batches = stack()
    dense = copy.deepcopy(model)
    seen = []
    report = dsnot_(
        model,
        batches,
        start=start,
        pattern=pattern,
        on_progress=lambda done, total, name: seen.append((done, total)),
    )
    assert seen == [(i + 1, 6) for i in range(6)]
    assert (report.start, report.skip) == (start, None)
    assert report.masks.sparsity() == 0.5
    assert report.swaps > 0
    assert list(report.layers) == list(report.masks)
    for name, mask in report.masks.items():
        weight, before = model.get_parameter(name), dense.get_parameter(name)
        assert torch.equal(weight, torch.where(mask, before, 0.0))
        assert bool((mask.sum(1) == 12).all())
        if pattern:
            assert NM(2, 4).is_satisfied(mask, exact=True)
        layer = report.layers[name]
        assert layer.error_after <= layer.error_before
    assert torch.equal(model.head.weight, dense.head.weight)
    assert report.error_reduction > 0.3


def test_a_block_is_refined_on_what_its_pruned_predecessors_produce():
    model, batches = stack()
    dense = copy.deepcopy(model)
    masks = dsnot_(model, batches, 0.6, start="magnitude").masks
    mixed = copy.deepcopy(model)
    mixed.layers[2].load_state_dict(dense.layers[2].state_dict())
    stats = InputStats(mixed.layers[2].attention, "x")
    handle = mixed.layers[2].attention.register_forward_pre_hook(lambda m, a: stats.update(a[0]))
    for batch in batches:
        mixed(batch)
    handle.remove()
    weight = dense.layers[2].attention.weight.detach()
    wanted = refine_mask(weight, row_mask(weight.abs(), 0.6), stats)
    assert torch.equal(masks["layers.2.attention.weight"], wanted)


def test_the_start_of_sparsegpt_is_its_score_with_a_real_hessian():
    """The released code never accumulates the Hessian and so prunes the first columns."""
    model, batches = stack()
    weight = model.layers[0].attention.weight.detach().clone()
    masks = dsnot_(model, batches, 0.5, start="sparsegpt", max_cycles=0).masks
    x = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
    hessian = 2 / 9 * x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(24)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    score = (weight.double() / upper.diagonal()).square()
    wanted = torch.ones_like(masks["layers.0.attention.weight"])
    wanted.scatter_(1, score.argsort(1)[:, :12], False)
    assert torch.equal(masks["layers.0.attention.weight"], wanted)
    assert bool(wanted[:, :12].any())


def test_masks_made_elsewhere_are_refined():
    model, batches = stack()
    twin = copy.deepcopy(model)
    given = dict(magnitude_(copy.deepcopy(model), 0.6, scope="row"))
    report = dsnot_(model, batches, start=given)
    assert report.start == "given"
    assert report.masks == dsnot_(twin, batches, 0.6, start="magnitude").masks
    del given["layers.1.fc.weight"]
    with pytest.raises(ValueError, match=r"start: .*layers\.1\.fc\.weight"):
        dsnot_(stack()[0], batches, start=given)
    with pytest.raises(ValueError, match=r"start\['layers.0.attention.weight'\] is torch.float32"):
        dsnot_(stack()[0], batches, start={"layers.0.attention.weight": torch.ones(24, 24)})


def test_skipping_the_mlp_refines_attention_only():
    model, batches = stack()
    twin = copy.deepcopy(model)
    report = dsnot_(model, batches, 0.6, skip="mlp")
    assert all(name.endswith("attention.weight") for name in report.layers)
    assert len(report.layers) == 3
    plain = wanda_(twin, batches, 0.6)
    assert not torch.equal(*(m["layers.0.attention.weight"] for m in (report.masks, plain)))
    # The MLP of the first block sees a refined attention, so only its counts are Wanda's.
    assert bool((report.masks["layers.0.fc.weight"].sum(1) == 10).all())
    with pytest.raises(ValueError, match="attention"):
        dsnot_(stack()[0], batches, 0.6, skip="mlp", include=["*.fc.weight"])


def test_half_precision_weights_stay_what_they_were():
    model, batches = stack()
    model = model.bfloat16()
    dense = copy.deepcopy(model)
    masks = dsnot_(model, [batch.bfloat16() for batch in batches], 0.6).masks
    for name, mask in masks.items():
        assert torch.equal(
            model.get_parameter(name), dense.get_parameter(name).masked_fill(~mask, 0.0)
        )


def test_sparsegpt_repairs_outputs_better_than_wanda_and_without_zeros_changes_nothing():
    model, batches = stack()
    dense, errors = copy.deepcopy(model), {}
    x = torch.cat(batches)
    for prune in (wanda_, sparsegpt_):
        twin = copy.deepcopy(model)
        prune(twin, batches, 0.6)
        errors[prune] = float((twin(x) - dense(x)).detach().square().mean())
    assert errors[sparsegpt_] <= errors[wanda_]
    sparsegpt_(model, batches, 0.0)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\), got -0.1"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "contradicts"),
        ({"pattern": "2:5"}, r"layers\.0\.attention\.weight"),
        ({"pattern": "4x1"}, "DSnoT knows"),
        ({"pattern": "2:4:axis0"}, "DSnoT knows"),
        ({"start": "wands"}, r"start='wands'.*wanda"),
        ({"skip": "attention"}, r"skip='attention'.*mlp"),
        ({"var": "total"}, r"var='total'.*within"),
        ({"threshold": -1.0}, r"threshold must be in \[0, inf\), got -1.0"),
        ({"threshold": math.nan}, r"threshold must be in \[0, inf\), got nan"),
        ({"var_power": -1.0}, r"var_power must be in \[0, inf\), got -1.0"),
        ({"max_cycles": -1}, "max_cycles must be at least 0, got -1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_pruned(options, message):
    model, batches = stack()
    dense = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        dsnot_(model, batches, **options)
    for p, q in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(p, q)


def test_bad_models_and_data_are_refused():
    model, batches = stack()
    with pytest.raises(ValueError, match="batches is empty"):
        dsnot_(model, [], 0.5)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.weight: .*NaN"):
        dsnot_(model, [torch.full_like(batches[0], math.nan)], 0.5)
    with pytest.raises(ValueError, match=r"no list of equal blocks.*sequential=False"):
        dsnot_(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), [torch.ones(2, 3, 4)], 0.5)
    with torch.device("meta"):
        meta = Stack()
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.weight: a meta weight"):
        dsnot_(meta, batches, 0.5)
    quantised = stack()[0]
    integers = nn.Parameter(torch.ones(24, 24, dtype=torch.int8), requires_grad=False)
    quantised.layers[1].fc.weight = integers
    with pytest.raises(ValueError, match=r"layers\.1\.fc\.weight: a torch.int8 weight"):
        dsnot_(quantised, batches, 0.5)
    layer, stats = layer_of(3, 8)
    with pytest.raises(ValueError, match=r"mask is torch\.float32"):
        refine_mask(layer.weight, torch.ones(3, 8), stats)
    with pytest.raises(ValueError, match="does not satisfy 2:4"):
        refine_mask(layer.weight, torch.ones(3, 8, dtype=torch.bool), stats, pattern="2:4")
    with pytest.raises(ValueError, match="nan"):
        bad = layer.weight.detach().clone()
        bad[0, 0] = math.nan
        refine_mask(bad, torch.ones(3, 8, dtype=torch.bool), stats)


def test_a_model_that_was_pruned_before_is_no_dense_reference():
    model, batches = stack()
    magnitude_(model, 0.5)
    with pytest.warns(UserWarning, match="% of the selected weights are zero already"):
        dsnot_(model, batches, 0.6)


def test_a_model_without_blocks_is_refined_in_one_pass_when_asked():
    torch.manual_seed(0)
    layer = nn.Linear(24, 8)
    dense = layer.weight.detach().clone()
    masks = dsnot_(layer, [inputs(4, 8, 24)], 0.6, sequential=False).masks
    assert isinstance(masks, MaskSet)
    assert torch.equal(layer.weight, torch.where(masks["weight"], dense, 0.0))
