"""Scores against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aerogel.sparsity import (
    SCORES,
    ScoreContext,
    balanced_halves,
    compute_scores,
    hessian_gradients,
    loss_gradients,
    select_parameters,
    synflow_gradients,
)
from aerogel.sparsity.calibrate import collect_input_stats
from aerogel.sparsity.scores import initial_learned_scores, inverse_cholesky


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(12, 6), torch.arange(12) % 3


def test_magnitude_ranks_the_stored_weight(net):
    selection = select_parameters(net)
    scores = compute_scores(selection)
    assert torch.equal(scores["0.weight"], net[0].weight.detach().abs())


def test_random_follows_its_generator(net):
    selection = select_parameters(net)
    draw = [
        compute_scores(selection, "random", ScoreContext(torch.Generator().manual_seed(3)))
        for _ in range(2)
    ]
    assert torch.equal(draw[0]["3.weight"], draw[1]["3.weight"])


def test_snip_is_the_gradient_with_respect_to_the_mask(net, batch):
    selection = select_parameters(net)
    gradients = loss_gradients(net, selection, [batch])
    scores = compute_scores(selection, "snip", ScoreContext(gradients=gradients))
    mask = torch.ones_like(net[3].weight, requires_grad=True)
    hidden = net[2](net[1](net[0](batch[0])))
    loss = F.cross_entropy(F.linear(hidden, net[3].weight * mask, net[3].bias), batch[1])
    expected = torch.autograd.grad(loss, mask)[0].abs()
    assert torch.allclose(scores["3.weight"], expected, atol=1e-6)
    taylor = compute_scores(selection, "taylor", ScoreContext(gradients=gradients))["3.weight"]
    assert torch.allclose(taylor, expected.square(), atol=1e-6)


def test_gradients_leave_no_trace(net, batch):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    selection = select_parameters(net)
    loss_gradients(net, selection, [batch, batch])
    hessian_gradients(net, selection, [batch])
    synflow_gradients(net, selection, (6,))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_grasp_is_the_weight_times_the_hessian_gradient_product():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(8, 3).double(), torch.arange(8) % 2
    selection = select_parameters(net)
    weights = [ref.parameter for ref in selection.values()]

    def loss_of(*values):
        hidden = torch.tanh(F.linear(x, values[0], net[0].bias))
        return F.cross_entropy(F.linear(hidden, values[1], net[2].bias) / 200.0, y)

    values = tuple(w.detach() for w in weights)
    hessian = torch.autograd.functional.hessian(loss_of, values)
    gradient = torch.autograd.grad(loss_of(*weights), weights)
    expected = [
        sum(torch.tensordot(hessian[i][j], gradient[j], 2) for j in range(2)) for i in range(2)
    ]
    products = hessian_gradients(net, selection, [(x, y)])
    for product, want in zip(products.values(), expected, strict=True):
        assert torch.allclose(product, want, atol=1e-12)
    scores = compute_scores(selection, "grasp", ScoreContext(hessian_gradients=products))
    assert torch.allclose(scores["0.weight"], values[0] * expected[0], atol=1e-12)


def test_grasp_halves_are_balanced():
    x, y = torch.randn(300, 4), torch.arange(300) % 3
    halves = balanced_halves([(x, y)], num_classes=3, per_class=24)
    assert [len(labels) for _, labels in halves] == [36, 36]
    assert all(torch.bincount(labels).tolist() == [12, 12, 12] for _, labels in halves)
    with pytest.raises(ValueError, match=r"\[0, 1, 2\]"):
        balanced_halves([(x, y)], num_classes=3, per_class=101)


def test_synflow_of_a_linear_chain_is_the_sum_over_paths():
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    selection = select_parameters(net)
    gradients = synflow_gradients(net, selection, (2,))
    scores = compute_scores(selection, "synflow", ScoreContext(gradients=gradients))
    first, second = net[0].weight.detach().abs(), net[1].weight.detach().abs()
    assert torch.allclose(scores["0.weight"].float(), first * second.t())
    assert torch.allclose(scores["1.weight"].float(), second * first.sum(1)[None])


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_momentum_reads_the_optimizers_state(net, batch, kind):
    optimizer = (
        torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        if kind == "sgd"
        else torch.optim.Adam(net.parameters())
    )
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()
    selection = select_parameters(net)
    score = compute_scores(selection, "momentum", ScoreContext(optimizer=optimizer))["0.weight"]
    state = optimizer.state[net[0].weight]
    if kind == "sgd":
        assert torch.equal(score, state["momentum_buffer"].abs())
    else:
        expected = (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)).abs()
        assert torch.equal(score, expected)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv1d(4, 6, 3, groups=2, padding=1)])
def test_calibrated_scores_follow_their_formulas(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    linear = isinstance(layer, nn.Linear)
    inputs = [torch.randn(4, 7, 6) if linear else torch.randn(4, 4, 9) for _ in range(3)]
    selection = select_parameters(model)
    statistics = collect_input_stats(
        model, inputs, selection, stats={"sum", "sumsq", "hessian"}, sequential=False
    )
    ctx = ScoreContext(statistics=statistics)
    weight = layer.weight.detach()
    for kind in ("wanda", "obs", "signed_mean"):
        score = compute_scores(selection, kind, ctx)["0.weight"]
        assert score.shape == weight.shape
        assert bool(torch.isfinite(score).all())
    if linear:
        x = torch.cat(inputs)
        norm = x.square().sum((0, 1)).div(12).sqrt()
        wanda = compute_scores(selection, "wanda", ctx)["0.weight"]
        assert torch.allclose(wanda, weight.abs() * norm, rtol=1e-4)
        mean = compute_scores(selection, "signed_mean", ctx)["0.weight"]
        assert torch.allclose(mean, weight * x.sum((0, 1)) / 12, atol=1e-5)


def test_inverse_cholesky_factors_the_damped_inverse():
    torch.manual_seed(0)
    root = torch.randn(9, 5, dtype=torch.float64)
    hessian = root.t() @ root
    factor = inverse_cholesky(hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(5)
    assert torch.allclose(factor.t() @ factor, torch.linalg.inv(damped))
    assert torch.equal(factor, factor.triu())


def test_a_dead_input_does_not_break_the_hessian():
    hessian = torch.diag(torch.tensor([2.0, 0.0, 1.0]))
    assert bool(torch.isfinite(inverse_cholesky(hessian)).all())


def test_learned_scores_begin_as_the_magnitude_ranking(net):
    weight = net[0].weight.detach()
    start = initial_learned_scores(weight)
    assert float(start.abs().max()) == pytest.approx((6 / 6) ** 0.5)
    assert torch.equal(start.abs().flatten().argsort(), weight.abs().flatten().argsort())


@pytest.mark.parametrize("kind", sorted(set(SCORES) - {"magnitude", "random"}))
def test_scores_say_what_they_lack(net, kind):
    with pytest.raises(ValueError, match=r"needs|optimizer"):
        compute_scores(select_parameters(net), kind)


def test_unknown_scores_list_the_nearest(net):
    with pytest.raises(ValueError, match=r"magnitud.*magnitude"):
        compute_scores(select_parameters(net), "magnitud")


def test_gradients_need_batches_and_trainable_weights(net, batch):
    selection = select_parameters(net)
    with pytest.raises(ValueError, match="empty"):
        loss_gradients(net, selection, [])
    with pytest.raises(ValueError, match="empty"):
        hessian_gradients(net, selection, [])
    net[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight"):
        loss_gradients(net, selection, [batch])
