import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.sparsity.calibrate import collect_input_stats
from aerogel.sparsity.input_stats import InputStats
from aerogel.sparsity.obs import sparsegpt_weight
from aerogel.sparsity.oneshot import magnitude_, sparsegpt_, wanda_, wanda_mask
from aerogel.sparsity.patterns import NM
from aerogel.sparsity.select import select_parameters


def correlated(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """Inputs whose features share a few directions, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(max(2, features // 4), features, generator=generator)
    scale = torch.rand(features, generator=generator) * 2 + 0.1
    x = torch.randn(tokens, basis.shape[0], generator=generator) @ basis
    return (x + 0.1 * torch.randn(tokens, features, generator=generator)) * scale


def wanda_oracle(weight, samples, sparsity, nm=None):
    """Row by row in plain Python, from the paper's formula."""
    norm = torch.stack([s.square().sum(0) for s in samples]).mean(0).sqrt()
    mask = torch.ones_like(weight, dtype=torch.bool)
    for i in range(weight.shape[0]):
        score = [float(abs(weight[i, j]) * norm[j]) for j in range(weight.shape[1])]
        spans = [range(len(score))]
        if nm is not None:
            spans = [range(k, k + nm[1]) for k in range(0, len(score), nm[1])]
        for span in spans:
            drop = math.floor(sparsity * len(span) + 1e-9)
            for j in sorted(span, key=lambda j: score[j])[:drop]:
                mask[i, j] = False
    return mask


def sparsegpt_oracle(weight, hessian, sparsity, nm=None, block=128, damp=0.01):
    """Algorithm 1 column by column in float64: no lazy batches, the whole remaining row at once."""
    w, h = weight.double().clone(), hessian.double().clone()
    rows, columns = w.shape
    h[range(columns), range(columns)] += damp * h.diagonal().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if nm is not None and j % nm[1] == 0:
            score = (w[:, j : j + nm[1]] / upper.diagonal()[j : j + nm[1]]).square()
            drop = score.argsort(dim=1)[:, : nm[1] - nm[0]]
            mask[:, j : j + nm[1]].scatter_(1, drop, False)
        if nm is None and j % block == 0:
            stop = min(j + block, columns)
            count = math.floor(sparsity * rows * stop + 1e-9) - math.floor(
                sparsity * rows * j + 1e-9
            )
            score = (w[:, j:stop] / upper.diagonal()[j:stop]).square()
            flat = torch.ones(score.numel(), dtype=torch.bool)
            flat[score.flatten().argsort()[:count]] = False
            mask[:, j:stop] = flat.view_as(score)
        error = torch.where(mask[:, j], 0.0, w[:, j]) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
        w[:, j] = torch.where(mask[:, j], w[:, j], 0.0)
    return w, mask


def layer_error(layer, dense, x):
    return float((x @ (layer.weight - dense).detach().t()).square().mean())


def linear(out=48, features=64, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(features, out, bias=False)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6),
    features=st.integers(2, 24),
    sparsity=st.floats(0, 0.95),
    seed=st.integers(0, 99),
)
def test_wanda_equals_the_dense_reference_row_by_row(rows, features, sparsity, seed):
    layer = linear(rows, features, seed)
    samples = [correlated(7, features, seed + i) for i in range(3)]
    dense = layer.weight.detach().clone()
    pruned = math.floor(sparsity * features + 1e-9)
    masks = wanda_(layer, samples_as_batches(samples), sparsity)
    wanted = wanda_oracle(dense, samples, sparsity)
    if pruned < features:
        assert torch.equal(masks["weight"], wanted)
        assert bool(((~masks["weight"]).sum(1) == pruned).all())
    assert torch.equal(layer.weight, torch.where(masks["weight"], dense, 0.0))


def samples_as_batches(samples):
    return [s[None] for s in samples]


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (4, 8)])
def test_wanda_and_sparsegpt_keep_n_of_every_m(nm):
    x = correlated(50, 64)
    for prune in (wanda_, sparsegpt_):
        layer = linear()
        dense = layer.weight.detach().clone()
        masks = prune(layer, [x[None]], pattern=f"{nm[0]}:{nm[1]}")
        assert NM(*nm).is_satisfied(masks["weight"], exact=True)
        assert torch.equal(layer.weight != 0, masks["weight"])
        if prune is wanda_:
            wanted = wanda_oracle(dense, [x], 1 - nm[0] / nm[1], nm)
        else:
            h = 2 * x.T @ x
            weight, wanted = sparsegpt_oracle(dense, h, 0.5, nm)
            assert torch.allclose(layer.weight.double(), weight, atol=1e-4)
        assert torch.equal(masks["weight"], wanted)


def test_wanda_with_equal_norms_is_magnitude_per_row():
    a, b = linear(), linear()
    x = torch.randn(10, 64).sign()
    masks = wanda_(a, [x[None]], 0.6)
    assert masks == magnitude_(b, 0.6, scope="row")
    assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("block", [8, 24, 128])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_sparsegpt_equals_the_dense_reference(block, sparsity):
    layer, x = linear(20, 64), correlated(300, 64)
    hessian = 2 * x.T @ x
    weight, mask = sparsegpt_weight(layer.weight.detach(), hessian, sparsity, block=block)
    wanted, wanted_mask = sparsegpt_oracle(layer.weight.detach(), hessian, sparsity, block=block)
    assert int((~mask).sum()) == math.floor(sparsity * 20 * 64)
    assert torch.equal(mask, wanted_mask)
    assert torch.allclose(weight.double(), wanted, atol=2e-4)
    assert bool((weight[~mask] == 0).all())


def test_sparsegpt_without_sparsity_is_the_identity():
    layer, x = linear(), correlated(100, 64)
    x[:, 5] = 0
    weight, mask = sparsegpt_weight(layer.weight.detach(), 2 * x.T @ x, 0.0)
    assert torch.equal(weight, layer.weight)
    assert bool(mask.all())


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_sparsegpt_beats_wanda_beats_magnitude_on_correlated_inputs(sparsity):
    calibration, held_out = correlated(600, 64), correlated(200, 64)
    errors = {}
    for name in ("magnitude", "wanda", "sparsegpt"):
        layer = linear()
        dense = layer.weight.detach().clone()
        if name == "magnitude":
            magnitude_(layer, sparsity)
        else:
            {"wanda": wanda_, "sparsegpt": sparsegpt_}[name](layer, [calibration[None]], sparsity)
        errors[name] = layer_error(layer, dense, held_out)
    assert errors["sparsegpt"] < 0.7 * errors["wanda"]
    assert errors["wanda"] < errors["magnitude"]


def test_sparsegpt_comes_near_the_least_squares_optimum_of_its_mask():
    layer, x = linear(12, 32), correlated(400, 32)
    dense = layer.weight.detach().clone()
    masks = sparsegpt_(layer, [x[None]], 0.5)
    best = torch.zeros_like(dense)
    for i, row in enumerate(masks["weight"]):
        best[i, row] = torch.linalg.lstsq(x[:, row], x @ dense[i]).solution
    masked = nn.Linear(32, 12, bias=False)
    masked.weight.data = torch.where(masks["weight"], dense, 0.0)
    optimum = float((x @ best.t() - x @ dense.t()).square().mean())
    assert layer_error(layer, dense, x) < 0.5 * layer_error(masked, dense, x)
    assert layer_error(layer, dense, x) >= optimum * 0.999


def test_inputs_that_are_always_zero_are_pruned_first():
    layer, x = linear(), correlated(100, 64)
    x[:, [3, 40]] = 0
    for prune in (wanda_, sparsegpt_):
        twin = copy.deepcopy(layer)
        masks = prune(twin, [x[None]], 0.25)
        assert not bool(masks["weight"][:, [3, 40]].any())
        assert bool(torch.isfinite(twin.weight).all())


@pytest.mark.parametrize(
    "conv", [nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 12, 3, groups=2), nn.Conv1d(8, 4, 3)]
)
def test_convolutions_are_pruned_as_their_unfolded_matrix(conv):
    torch.manual_seed(0)
    x = torch.randn(6, 8, *([9, 9][: conv.weight.ndim - 2]))
    dense = copy.deepcopy(conv)
    errors = {}
    for prune in (wanda_, sparsegpt_):
        twin = copy.deepcopy(conv)
        masks = prune(twin, [x], pattern="2:4")
        assert NM(2, 4).is_satisfied(masks["weight"], exact=True)
        errors[prune] = float((twin(x) - dense(x)).square().mean())
        twin = copy.deepcopy(conv)
        masks = prune(twin, [x], 0.5)
        assert masks.sparsity() == pytest.approx(0.5, abs=0.02)
    assert errors[sparsegpt_] < errors[wanda_]
    stats = collect_input_stats(conv, [x], select_parameters(conv), ["hessian"])["weight"]
    weight, _ = sparsegpt_weight(conv.weight.detach(), stats.hessian, 0.5)
    if conv.groups == 1:
        wanted, _ = sparsegpt_oracle(conv.weight.detach().flatten(1), stats.hessian, 0.5)
        assert torch.allclose(weight.flatten(1).double(), wanted, atol=1e-3)


def test_half_precision_weights_stay_half_precision():
    layer = linear().to(torch.bfloat16)
    masks = sparsegpt_(layer, [correlated(100, 64)[None].bfloat16()], 0.5)
    assert layer.weight.dtype == torch.bfloat16
    assert bool((layer.weight[~masks["weight"]] == 0).all())


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, num_key_value_heads=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_a_causal_language_model_is_pruned_block_by_block():
    model = tiny_llama()
    dense = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(60, (4, 12), generator=generator) for _ in range(3)]
    seen = []
    masks = wanda_(
        model, batches, 0.5, on_progress=lambda done, total, name: seen.append((done, total))
    )
    assert len(masks) == 3 * 7
    assert seen == [(i + 1, 21) for i in range(21)]
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    assert masks.sparsity() == pytest.approx(0.5)
    # Statistics of a later layer come from the pruned layers before it.
    name = "model.layers.2.mlp.down_proj.weight"
    twin = _dense_from(model, dense, 2)
    stats = collect_input_stats(twin, batches, select_parameters(twin, include=[name]))
    weight = twin.model.layers[2].mlp.down_proj.weight.detach()
    assert torch.equal(masks[name], wanda_mask(weight, stats[name], 0.5))


def _dense_from(pruned, dense, block):
    """The pruned model with its blocks from `block` on dense again."""
    twin = copy.deepcopy(pruned)
    for i in range(block, len(dense.model.layers)):
        twin.model.layers[i].load_state_dict(dense.model.layers[i].state_dict())
    return twin


def test_sparsegpt_keeps_a_transformer_closer_than_wanda():
    model = tiny_llama()
    with torch.no_grad():  # random weights are too small to interact; trained ones are not
        for p in model.model.layers.parameters():
            p.mul_(4.0) if p.ndim == 2 else None
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(60, (8, 12), generator=generator) for _ in range(8)]
    with torch.no_grad():
        wanted = model(batches[0]).logits
    errors = {}
    for prune in (wanda_, sparsegpt_):
        twin = copy.deepcopy(model)
        prune(twin, batches, 0.5)
        with torch.no_grad():
            errors[prune] = float((twin(batches[0]).logits - wanted).square().mean())
    assert errors[sparsegpt_] < errors[wanda_]


def test_transposed_conv1d_weights_are_pruned_along_their_inputs():
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(5, 8)  # weight (8 inputs, 5 outputs)
    x = correlated(40, 8)
    dense = layer.weight.detach().clone()
    masks = wanda_(layer, [x[None]], 0.5)
    assert torch.equal(masks["weight"].t(), wanda_oracle(dense.t(), [x], 0.5))
    layer.weight.data = dense.clone()
    masks = sparsegpt_(layer, [x[None]], pattern="2:4")
    assert NM(2, 4).is_satisfied(masks["weight"].t(), exact=True)
    assert torch.equal(layer.weight != 0, masks["weight"])


def test_magnitude_follows_its_scope():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 6))
    with torch.no_grad():
        model[0].weight.fill_(100)
    twin = copy.deepcopy(model)
    assert magnitude_(model, 0.5).layer_density() == {"0.weight": 0.5, "1.weight": 0.5}
    masks = magnitude_(twin, 24 / 56, scope="global")
    assert masks.layer_density() == {"0.weight": 1.0, "1.weight": 0.0}
    blocks = magnitude_(nn.Linear(8, 8), 0.5, pattern="4x1")["weight"]
    assert bool((blocks[:4] == blocks[0]).all())


def test_bad_requests_are_refused():
    layer, x = linear(), torch.randn(1, 5, 64)
    for prune in (wanda_, sparsegpt_):
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1.0"):
            prune(layer, [x], 1.0)
        with pytest.raises(ValueError, match="contradicts"):
            prune(layer, [x], 0.6, "2:4")
        with pytest.raises(ValueError, match="batches is empty"):
            prune(layer, [], 0.5)
        with pytest.raises(ValueError, match=r"weight: .*NaN"):
            prune(layer, [torch.full_like(x, math.nan)], 0.5)
        with pytest.raises(ValueError, match="no list of equal blocks"):
            prune(layer, [x], 0.5, sequential=True)
        with pytest.raises(ValueError, match="'weight'"):
            prune(nn.Linear(6, 4), [torch.ones(1, 6)], pattern="2:4")
        with pytest.raises(ValueError, match="not both"):
            prune(layer, [x], selection=select_parameters(layer), include=["weight"])
    with pytest.raises(ValueError, match="SparseGPT knows"):
        sparsegpt_(layer, [x], 0.5, "4x1")
    with pytest.raises(ValueError, match="block"):
        sparsegpt_(layer, [x], block=0)
    with pytest.raises(ValueError, match="damp"):
        sparsegpt_(layer, [x], damp=0.0)
    with torch.no_grad():
        layer.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="'weight' has 1 nan"):
        sparsegpt_(layer, [x], 0.5)
    with torch.device("meta"), pytest.raises(ValueError, match="meta"):
        magnitude_(nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize("prune", [wanda_, sparsegpt_])
def test_integer_weights_are_named_before_the_model_runs(prune):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"1\.weight: a torch\.int8 weight cannot be pruned"):
        prune(model, [torch.randn(4, 8)], 0.5)


def test_pruning_a_pruned_model_warns():
    layer, x = linear(), torch.randn(1, 5, 64)
    magnitude_(layer, 0.5)
    with pytest.warns(UserWarning, match="50% of the selected weights are zero"):
        wanda_(layer, [x], 0.6)


def test_statistics_object_can_be_reused_for_other_sparsities():
    layer, x = linear(), correlated(30, 64)
    stats = InputStats(layer, "weight", ["sumsq"])
    stats.update(x[None])
    half = wanda_mask(layer.weight.detach(), stats, 0.5)
    more = wanda_mask(layer.weight.detach(), stats, 0.75)
    assert not bool((more & ~half).any())
