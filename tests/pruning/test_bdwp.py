"""Bidirectional N:M training, promise by promise; products against formulas in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aerogel import kernels, runtime
from aerogel.kernels.nm_trained import NMProduct
from aerogel.pruning import BidirectionalNM
from aerogel.sparsity import NM


class One(nn.Module):
    """One layer in float64, whose gradients are compared with formulas."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer = {
            "linear": lambda: nn.Linear(16, 8),
            "conv": lambda: nn.Conv2d(16, 8, 3, padding=1),
            "strided": lambda: nn.Conv2d(16, 8, 3, stride=2, padding=2, dilation=2),
        }[kind]()
        self.double()

    def forward(self, x):
        return self.layer(x)

    def sample(self):
        generator = torch.Generator().manual_seed(1)
        shape = (5, 16) if isinstance(self.layer, nn.Linear) else (2, 16, 7, 9)
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    def reference(self, x, weight):
        """The layer's product with another weight."""
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        conv = self.layer
        return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def made(model, optimizer=None, n=2, m=4, **options):
    options = {"exclude": (), "include": ("layer",), **options}
    return BidirectionalNM(model, optimizer or sgd(model), n, m, **options)


@pytest.mark.parametrize("kind", ["linear", "conv", "strided"])
@pytest.mark.parametrize("mode", ["bdwp", "sr_ste", "sdwp", "sdgp"])
def test_all_three_products_are_those_of_the_table(kind, mode):
    model = One(kind)
    weight = model.layer.weight.detach().clone()
    pruner = made(model, mode=mode)
    m_f, m_b = NM(2, 4).select(weight.abs()), NM(2, 4, axis=0).select(weight.abs())
    forward = weight * m_f if mode in ("bdwp", "sr_ste") else weight
    backward = weight * {"bdwp": m_b, "sdwp": m_b, "sr_ste": m_f}.get(mode, torch.tensor(1.0))
    x = model.sample()
    out = model(x)
    torch.testing.assert_close(out, model.reference(x, forward))
    upstream = torch.randn_like(out)
    out.backward(upstream)
    read = upstream
    if mode == "sdgp":
        read = upstream * NM(2, 4).select(upstream.abs())
    other = x.detach().clone().requires_grad_()
    (to_x,) = torch.autograd.grad(model.reference(other, backward), other, read)
    torch.testing.assert_close(x.grad, to_x)
    dense = weight.clone().requires_grad_()
    (to_weight,) = torch.autograd.grad(model.reference(x.detach(), dense), dense, upstream)
    leaf = pruner.controller.selection["layer.weight"].parameter
    torch.testing.assert_close(leaf.grad, to_weight)
    if mode == "bdwp":
        other = x.detach().clone().requires_grad_()
        (wrong,) = torch.autograd.grad(model.reference(other, forward), other, upstream)
        assert not torch.allclose(x.grad, wrong)


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
@pytest.mark.parametrize("mode", ["bdwp", "sdwp", "sdgp"])
def test_sparse_products_train_as_dense_ones(mode, monkeypatch):
    """In float32, where a linear layer of a wide pattern runs natively."""
    seen = []
    masked = NMProduct.masked
    monkeypatch.setattr(NMProduct, "masked", lambda p, *a: seen.append(p.axis) or masked(p, *a))

    def trained():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 8))
        optimizer = sgd(model)
        pruner = BidirectionalNM(model, optimizer, 2, 8, mode=mode, exclude=())
        x = torch.randn(80, 48)
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            pruner.step()
        return [p.detach().clone() for p in pruner.controller.selection.parameters().values()]

    sparse = trained()
    assert {"bdwp": {0, 1}, "sdwp": {0, 1}, "sdgp": set()}[mode] == set(seen)
    again = trained()
    monkeypatch.setenv("AEROGEL_KERNELS", "reference")
    for ours, same, dense in zip(sparse, again, trained(), strict=True):
        assert torch.equal(ours, same)
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients_see_the_masked_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    BidirectionalNM(model, sgd(model), 2, 8, exclude=(), include=("0",))
    x = torch.randn(80, 16, requires_grad=True)
    (to_x,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(to_x.sum(), x)
    layer = model[0]
    kept = [(layer.weight * m).detach() for m in (layer.mask_forward, layer.mask_backward)]
    # d/dx of 2 (x F^T + b) B, summed over the columns of B; the inner x runs through the layer.
    torch.testing.assert_close(
        twice, (2 * kept[1].sum(1)).expand(80, 16) @ kept[1], rtol=1e-4, atol=1e-5
    )


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)
    )


def train(model, stepper, optimizer, steps):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 16, generator=generator)
        y = torch.randint(0, 10, (8,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        stepper.step()


def test_masks_follow_the_weights_after_every_step_with_n_of_every_m():
    model = net()
    optimizer = sgd(model)
    pruner = BidirectionalNM(model, optimizer, 2, 8)
    seen = []
    for _ in range(30):
        train(model, pruner, optimizer, 1)
        weight = model[2].weight.detach().abs()
        assert torch.equal(pruner.masks["2.weight"], NM(2, 8).select(weight))
        backward = pruner.backward_masks["2.weight"]
        assert torch.equal(backward, NM(2, 8, axis=0).select(weight))
        assert NM(2, 8, axis=0).is_satisfied(backward, exact=True)
        seen.append(pruner.masks["2.weight"].clone())
    assert not torch.equal(seen[0], seen[-1])


def test_refresh_takes_weights_that_something_else_changed():
    model = net()
    pruner = BidirectionalNM(model, sgd(model), 2, 8)
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(24, 32))
    pruner.refresh()
    weight = model[2].weight.detach().abs()
    assert torch.equal(pruner.masks["2.weight"], NM(2, 8).select(weight))
    assert torch.equal(pruner.backward_masks["2.weight"], NM(2, 8, axis=0).select(weight))


def test_keeping_all_of_every_group_is_dense_training_bit_for_bit():
    ours, theirs = net(), net()
    a, b = sgd(ours), sgd(theirs)
    train(ours, BidirectionalNM(ours, a, 8, 8), a, 12)
    train(theirs, b, b, 12)
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left, right)


def test_finalizing_keeps_the_logits_and_leaves_plain_layers():
    model = net()
    optimizer = sgd(model)
    pruner = BidirectionalNM(model, optimizer, 2, 8)
    train(model, pruner, optimizer, 10)
    x = torch.randn(4, 16)
    before = model(x)
    pruner.finalize()
    assert type(model[2]) is nn.Linear
    assert "mask_forward" not in dict(model.named_buffers())
    assert NM(2, 8).is_satisfied(model[2].weight != 0, exact=True)
    torch.testing.assert_close(model(x), before)
    compiled = runtime.compile(model.eval(), (x,), threads=1)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="finalized"):
        pruner.finalize()


def test_first_layer_odd_classifier_and_depthwise_layers_stay_dense():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 32, 1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    pruner = BidirectionalNM(model, sgd(model), 2, 8)
    assert set(pruner.masks) == {"2.weight"}


@pytest.mark.parametrize(
    ("mode", "factor"), [("bdwp", 1.5), ("sr_ste", 2.25), ("sdwp", 2.25), ("sdgp", 2.25)]
)
def test_flops_of_a_step_are_the_papers(mode, factor):
    model = net()
    pruner = BidirectionalNM(model, sgd(model), 2, 8, mode=mode)
    dense = 2 * (16 * 32 + 24 * 10)
    assert pruner.flops_per_step(torch.randn(1, 16)) == 3 * dense + factor * 2 * 24 * 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "unknown mode 'both'"),
        ({"n": 5}, "n"),
        (
            {"mode": "sr_ste", "sr_ste_lambda": -1.0},
            r"sr_ste_lambda must be in .*, got -1.0",
        ),
        ({"m": 3}, r"layer.weight \(inputs, axis 1\)"),
        ({"m": 16}, r"layer.weight \(outputs, axis 0\)"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        made(One("linear"), **options)


def test_grouped_convolutions_and_half_precision_are_refused():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=2))
    with pytest.raises(ValueError, match="groups=1"):
        BidirectionalNM(model, sgd(model), 2, 8, include=("0",), exclude=())
    model = net().to(torch.float16)
    with pytest.raises(ValueError, match="float32 master weights"):
        BidirectionalNM(model, sgd(model), 2, 8)
