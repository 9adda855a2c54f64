"""Sparse then prune: the penalty, the recipe and the global mask, promise by promise."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from aerogel.models import VisionTransformer
from aerogel.pruning import METHODS, Goal
from aerogel.pruning.sparse_then_prune import (
    Loaders,
    PenalisedPruner,
    evaluate,
    global_masks,
    prunable_weights,
    sparse_then_prune,
)
from aerogel.sparsity import attention_log
from aerogel.sparsity.fused_penalty import attention_log_penalty
from aerogel.sparsity.penalties import AttentionLogPenalty


def vit(**kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "in_chans": 1, "embed_dim": 12, "depth": 3, "num_heads": 2}
    return VisionTransformer(8, **{**sizes, "num_classes": 3, "mlp_ratio": 2.0, **kwargs})


def batches(count: int = 3, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 1, 8, 8, generator=generator),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def loaders() -> Loaders:
    return Loaders(batches(), batches(2, 2))


# The fused penalty


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 60),
)
def test_the_fused_penalty_equals_the_eager_one(batch, heads, queries, keys, chunk):
    q = torch.randn(batch, heads, queries, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(batch, heads, keys, 4, dtype=torch.float64, requires_grad=True)
    eager = attention_log((q @ k.transpose(-2, -1) * 0.7).softmax(-1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aerogel.sparsity.fused_penalty._CHUNK", chunk)
        fused = attention_log_penalty(q, k, 0.7)
        gradients = torch.autograd.grad(fused, (q, k))
    torch.testing.assert_close(fused, eager, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(eager, (q, k)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


def test_the_fused_penalty_passes_gradcheck():
    q = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: attention_log_penalty(a, b, 0.5), (q, k))


def test_the_fused_penalty_has_the_ends_of_its_range():
    n = 7
    zeros = torch.zeros(2, 1, n, n, dtype=torch.float64)
    assert attention_log_penalty(zeros, zeros, 1.0).item() == pytest.approx(
        math.log(1 + 1 / n**2), rel=1e-12
    )
    sharp = 1e4 * torch.eye(n, dtype=torch.float64).expand(2, 1, n, n)
    assert attention_log_penalty(sharp, sharp, 1.0).item() == pytest.approx(math.log(2) / n)
    half = torch.randn(1, 1, 4, 8, dtype=torch.bfloat16)
    assert attention_log_penalty(half, half, 1.0).dtype is torch.float32
    with pytest.raises(ValueError, match="q and k must be"):
        attention_log_penalty(zeros, zeros[..., :3], 1.0)


def test_the_fused_penalty_never_holds_the_whole_map():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.most = max(self.most, out.numel())
            return out

    q = torch.randn(1, 2, 64, 4, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch, Largest() as mode:
        patch.setattr("aerogel.sparsity.fused_penalty._CHUNK", 2 * 64 * 8)
        attention_log_penalty(q, q, 1.0).backward()
    assert mode.most <= 2 * 64 * 8


# The penalty on a model


def test_only_the_last_block_enters_but_gradients_reach_the_first():
    model, x = vit(), batches(1)[0][0]
    with AttentionLogPenalty(model, 2.0) as penalty:
        assert penalty.names == ["blocks.2.attn.core"]
        model(x)
        penalty.value().backward()
        before = penalty.value().detach()
        assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
        assert model.blocks[2].attn.proj.weight.grad is None
        # Other queries and keys in the first block, with its output held fixed.
        held = model.blocks[0](model._embed(x)[0]).detach()
        handle = model.blocks[0].register_forward_hook(lambda m, a, out: held)
        with torch.no_grad():
            model.blocks[0].attn.qkv.weight.mul_(5.0)
        model(x)
        handle.remove()
        torch.testing.assert_close(penalty.value(), before)


def test_fused_and_eager_penalties_agree_on_a_model():
    model, x = vit().double(), batches(1)[0][0].double()
    found = []
    for fused in (True, False):
        with AttentionLogPenalty(model, 1.0, "all", fused=fused) as penalty:
            model(x)
            weight = model.blocks[1].attn.qkv.weight
            found.append((penalty.value(), torch.autograd.grad(penalty.value(), weight)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-14)


def test_an_attached_penalty_gives_the_gradients_of_the_sum():
    x, y = batches(1)[0]
    gradients = []
    for attach in (True, False):
        model = vit()
        with AttentionLogPenalty(model, 50.0, "all", attach=attach) as penalty:
            loss = F.cross_entropy(model(x), y)
            (loss if attach else loss + penalty.value()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_lambda_zero_trains_bit_for_bit_as_without():
    model, plain = vit(), vit()
    options = {"epochs": 2, "ratio": 0.0, "ratios": ()}
    sparse_then_prune(model, loaders(), lam=0.0, **options)
    optimizer = torch.optim.SGD(plain.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=6, pct_start=0.5)
    losses, kept = [], []
    for _ in range(2):
        plain.train()
        losses.append(0.0)
        for x, y in batches():
            optimizer.zero_grad()
            loss = F.cross_entropy(plain(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses[-1] += loss.item()
        kept.append(copy.deepcopy(plain.state_dict()))
    best = kept[losses.index(min(losses))]
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


# What is pruned


def test_candidates_are_the_published_ones():
    model = vit()
    names = set(prunable_weights(model))
    expected = {"patch_embed.proj.weight", "head.weight"}
    for block in range(3):
        for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            expected.add(f"blocks.{block}.{layer}.weight")
    assert names == expected
    without = set(prunable_weights(model, include_norm=False))
    assert without == {name for name in expected if "norm" not in name}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.77])
def test_masks_equal_torchs_global_pruning(ratio: float):
    model = vit()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.add_(torch.randn_like(norm.weight) * 0.1)  # no ties at 1
    selection = prunable_weights(model)
    masks = global_masks(selection, ratio)
    assert sum(int((~m).sum()) for m in masks.values()) == round(ratio * selection.numel)
    theirs = copy.deepcopy(model)
    layers = [(theirs.get_submodule(n.removesuffix(".weight")), "weight") for n in selection]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=ratio)
    for name, (module, _) in zip(selection, layers, strict=True):
        assert torch.equal(masks[name], module.weight_mask.bool()), name


def test_masks_are_nested_and_all_else_is_untouched():
    model, reference = vit(), vit()
    result = sparse_then_prune(model, loaders(), epochs=0, ratio=0.6, ratios=(0.2, 0.4))
    selection = prunable_weights(reference)
    kept = [global_masks(selection, ratio) for ratio in (0.2, 0.4, 0.6)]
    for looser, tighter in itertools.pairwise(kept):
        assert all(bool((looser[name] | ~tighter[name]).all()) for name in looser)
    for name, value in model.state_dict().items():
        before = reference.state_dict()[name]
        expected = before * result.masks[name] if name in result.masks else before
        assert torch.equal(value, expected), name
    assert list(result.curve) == [0.2, 0.4, 0.6]


def test_the_result_is_a_plain_model_measured_at_every_ratio():
    model = vit()
    result = sparse_then_prune(model, loaders(), epochs=1, ratio=0.5, ratios=(0.1,), lam=1.0)
    assert model.state_dict().keys() == vit().state_dict().keys()
    assert not any(m._forward_hooks for m in model.modules())
    assert result.pruned_metrics == result.curve[0.5] == evaluate(model, loaders().test)
    assert 0.0 <= result.dense_metrics["accuracy"] <= 100.0
    assert len(result.train_losses) == 1


def test_a_validation_set_chooses_the_epoch_instead_of_the_training_loss():
    class Counted(list):
        walked = 0

        def __iter__(self):
            self.walked += 1
            return super().__iter__()

    validation = Counted(batches(1, 5))
    with_validation = Loaders(batches(), batches(2, 2), validation)
    result = sparse_then_prune(vit(), with_validation, epochs=3, ratio=0.5, max_lr=0.5)
    assert validation.walked == 3
    assert 0 <= result.best_epoch < 3
    trained = sparse_then_prune(vit(), loaders(), epochs=3, ratio=0.5, max_lr=0.5)
    assert trained.best_epoch == trained.train_losses.index(min(trained.train_losses))


def test_a_large_attention_penalty_spreads_attention():
    def entropy(model: VisionTransformer) -> float:
        found = []
        core = model.attention_modules()[-1]
        handle = core.register_forward_hook(
            lambda m, a, out: found.append((a[0] @ a[1].transpose(-2, -1) * m.scale).softmax(-1))
        )
        model(batches(1)[0][0])
        handle.remove()
        return float(-(found[0] * found[0].log()).sum(-1).mean().detach())

    spread = []
    for lam in (0.0, 1000.0):
        model = vit()
        with torch.no_grad():
            model.blocks[2].attn.qkv.weight.mul_(40.0)
        sparse_then_prune(
            model,
            loaders(),
            lam=lam,
            epochs=8,
            ratio=0.0,
            ratios=(),
            optimizer=lambda m: torch.optim.Adam(m.parameters(), 1e-2),
            max_lr=1e-2,
        )
        spread.append(entropy(model))
    assert spread[1] > spread[0] + 0.2


@pytest.mark.parametrize("penalty", ["weight-log", "weight-l1"])
def test_weight_penalties_shrink_weights(penalty: str):
    norms = []
    for lam in (0.0, 1.0):
        model = vit()
        sparse_then_prune(
            model, loaders(), lam=lam, penalty=penalty, epochs=5, ratio=0.0, max_lr=0.01
        )
        norms.append(float(model.blocks[1].mlp.fc1.weight.abs().sum()))
    assert norms[1] < norms[0]


# For training loops of one's own


@pytest.mark.parametrize("penalty", ["attention", "weight-log"])
def test_the_pruner_trains_as_the_function_does(penalty: str):
    x, y = batches(1)[0]
    model, reference = vit(), vit()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = PenalisedPruner(model, optimizer, 0.5, lam=3.0, penalty=penalty)
    F.cross_entropy(model(x), y).backward()
    pruner.step()
    masks = pruner.finalize()
    sparse_then_prune(
        reference,
        Loaders([(x, y)], [(x, y)]),
        lam=3.0,
        penalty=penalty,
        epochs=1,
        ratio=0.5,
        ratios=(),
        optimizer=lambda m: _Fixed(m.parameters(), 0.1),
    )
    assert masks.sparsity() == pytest.approx(0.5, abs=1e-3)
    assert not any(m._forward_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-4, atol=1e-5)


class _Fixed(torch.optim.SGD):
    """SGD whose learning rate no schedule moves."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.1
        return super().step(closure)


def test_recipes_find_the_method():
    method = METHODS["sparse-then-prune"]
    model = vit()
    assert method.unfit(model) is None
    assert "Attention" in method.unfit(nn.Sequential(nn.Linear(3, 3)))
    names = ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
    goal = Goal(names, 0.5, "unstructured", 4, 0.0, 0.5, 0.0, 2, 3.0)
    pruner = method.build(model, torch.optim.SGD(model.parameters(), 0.1), goal)
    pruner.load_state_dict(pruner.state_dict())
    assert set(pruner.finalize()) == set(names)


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"lam": -0.1}, r"lam must be in \[0, inf\), got -0.1"),
        ({"lam": math.nan}, r"lam must be in \[0, inf\), got nan"),
        ({"ratio": 1.0}, "ratio must be in"),
        ({"ratio": -0.1}, "ratio must be in"),
        ({"ratios": (0.5, 2.0)}, "got 2.0"),
        ({"blocks": [3]}, "blocks holds 3"),
        ({"blocks": "first"}, "blocks='first'"),
        ({"penalty": "entropy"}, "penalty must be"),
        ({"epochs": -1}, "epochs"),
    ],
)
def test_bad_arguments_are_named(kwargs, match: str):
    with pytest.raises(ValueError, match=match):
        sparse_then_prune(vit(), loaders(), **{"epochs": 1, **kwargs})


def test_models_and_data_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"loaders\.train is empty"):
        sparse_then_prune(vit(), Loaders([], batches()), epochs=1)
    with pytest.raises(ValueError, match=r"loaders\.train is empty"):
        sparse_then_prune(vit(), Loaders(iter(()), batches()), epochs=1)
    with pytest.raises(ValueError, match=r"loaders\.test is empty"):
        sparse_then_prune(vit(), Loaders(batches(), []), epochs=1)
    with pytest.raises(ValueError, match=r"loaders\.validation is empty"):
        sparse_then_prune(vit(), Loaders(batches(), batches(), []), epochs=1)
    with pytest.raises(ValueError, match="batches is empty"):
        evaluate(vit(), [])
    with pytest.raises(ValueError, match="no parameter selected"):
        sparse_then_prune(nn.Sequential(nn.ReLU()), loaders(), epochs=0)
    with pytest.raises(ValueError, match=r"blocks.2.attn.core.*NaN"):
        broken = batches(1)
        broken[0][0][0, 0, 0, 0] = math.nan
        sparse_then_prune(vit(), Loaders(broken, broken), epochs=1)


def test_a_training_that_fails_gives_back_the_weights():
    model, good = vit().eval(), batches()
    before = copy.deepcopy(model.state_dict())
    good[-1][0].fill_(math.nan)
    with pytest.raises(ValueError, match=r"loss became|holds NaN"):
        sparse_then_prune(model, Loaders(good, batches()), lam=0.0, epochs=1)
    assert not any(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_penalty_that_cannot_be_read_says_so():
    class OpaqueAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(nn.Linear(4, 4), OpaqueAttention())
    with AttentionLogPenalty(model) as penalty:
        with pytest.raises(RuntimeError, match="no forward pass"):
            penalty.value()
        with pytest.raises(ValueError, match=r"'1' .OpaqueAttention. returns no attention"):
            model(torch.zeros(2, 4))
