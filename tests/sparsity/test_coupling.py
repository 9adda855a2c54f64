"""How masks act, against gradients written by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aerogel.sparsity import (
    NM,
    SRSTE,
    STE,
    Bidirectional,
    Constant,
    Frozen,
    LearnedMask,
    MaskController,
    MaskedWeight,
    MaskSet,
    Rebuild,
    Shrink,
    Soft,
    masked_parameters,
    nm_linear_bidirectional,
    nm_mask_,
    select_parameters,
)
from aerogel.sparsity.bidirectional import bidirectional_conv, bidirectional_linear
from aerogel.sparsity.coupling import COUPLINGS, make_coupling
from aerogel.sparsity.keep import Keep
from aerogel.sparsity.parametrizations import (
    attach_parametrization,
    detach_parametrization,
    learned_mask,
    masked,
    soft,
    straight_through,
)

PARAMETRIZED = ("frozen", "ste", "sr_ste", "soft")


@pytest.fixture
def case():
    torch.manual_seed(0)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    return weight, torch.rand(4, 6) < 0.5, torch.randn(4, 6, dtype=torch.float64)


def gradient_of(output, weight, upstream):
    return torch.autograd.grad(output, weight, upstream)[0]


def test_masked_forward_and_gradient(case):
    weight, mask, upstream = case
    assert torch.equal(masked(weight, mask), weight * mask)
    assert torch.equal(gradient_of(masked(weight, mask), weight, upstream), upstream * mask)
    assert torch.autograd.gradcheck(lambda w: masked(w, mask), weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeroing_by_bits_is_exact_in_every_type(dtype):
    torch.manual_seed(0)
    mask = torch.rand(7, 9) < 0.5
    values = torch.randn(7, 9).to(dtype)
    values[~mask] = torch.inf
    keep = Keep(mask, values)
    pruned = keep.pruned_part(values)
    assert bool((pruned[~mask] == torch.inf).all())
    assert bool((pruned[mask] == 0).all())
    zeroed = values.clone()
    keep.zero_(zeroed)
    assert torch.equal(zeroed, torch.where(mask, values, 0.0))
    assert not bool(zeroed.signbit()[~mask].any())
    keep.join_(zeroed, pruned)
    assert torch.equal(zeroed, values)
    for other in (torch.ones(7, 9, dtype=torch.float64), torch.ones(7, 9, dtype=torch.float16)):
        keep.zero_(other)
        assert torch.equal(other, mask.to(other.dtype))


def test_straight_through_passes_the_whole_gradient(case):
    weight, mask, upstream = case
    output = straight_through(weight, mask)
    assert torch.equal(output, weight * mask)
    assert torch.equal(gradient_of(output, weight, upstream), upstream)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_soft_forward_and_both_gradients(case, beta):
    weight, mask, upstream = case
    part = torch.tensor(beta, dtype=torch.float64)
    factor = mask + beta * ~mask
    assert torch.allclose(soft(weight, mask, part), weight * factor)
    assert torch.equal(gradient_of(soft(weight, mask, part), weight, upstream), upstream)
    chained = soft(weight, mask, part, "chain")
    assert torch.allclose(gradient_of(chained, weight, upstream), upstream * factor)
    assert torch.autograd.gradcheck(lambda w: soft(w, mask, part, "chain"), weight)


def test_learned_mask_trains_scores_through_the_selection(case):
    weight, mask, upstream = case
    scores = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    output = learned_mask(weight, scores, mask)
    to_weight, to_scores = torch.autograd.grad(output, (weight, scores), upstream)
    assert torch.equal(to_weight, upstream * mask)
    assert torch.equal(to_scores, scores.sign() * (upstream * weight))


def test_learned_mask_keeps_the_exact_count():
    layer = nn.Linear(6, 4)
    ref = select_parameters(layer)["weight"]
    part = LearnedMask(layer.weight, keep=5)
    attach_parametrization(ref, part)
    layer(torch.randn(3, 6)).sum().backward()
    assert int((layer.weight != 0).sum()) == 5
    assert part.scores.grad is not None
    assert LearnedMask(torch.randn(4, 8), 0, NM(1, 4)).mask.sum() == 8


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_bidirectional_linear_against_hand_formulas(shape):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    forward, backward = torch.rand(4, 5) < 0.5, torch.rand(4, 5) < 0.5
    y = bidirectional_linear(x, weight, forward, backward, bias)
    upstream = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), upstream)
    rows, inputs = upstream.reshape(-1, 4), x.detach().reshape(-1, 5)
    assert torch.allclose(y, F.linear(x, weight * forward, bias))
    assert torch.allclose(dx, upstream @ (weight * backward))
    assert not torch.allclose(dx, upstream @ (weight * forward))
    assert torch.allclose(dw, rows.t() @ inputs)
    assert torch.allclose(db, rows.sum(0))
    same = weight.detach()
    assert torch.autograd.gradcheck(lambda v: bidirectional_linear(v, same, forward, forward), x)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_the_bidirectional_operator_is_the_layers_function_in_graphs_too(shape):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    m_f = nm_mask_(torch.empty(4, 8, dtype=torch.bool), weight.detach().abs(), 1, 4)
    m_b = nm_mask_(torch.empty(4, 8, dtype=torch.bool), weight.detach().abs(), 1, 4, axis=0)
    assert torch.equal(m_f, NM(1, 4).select(weight.abs()))
    assert torch.equal(m_b, NM(1, 4, axis=0).select(weight.abs()))
    y = nm_linear_bidirectional(x, weight, m_f, m_b)
    upstream = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, weight), upstream)
    same = bidirectional_linear(x, weight, m_f, m_b)
    torch.testing.assert_close(y, same)
    for a, b in zip(ours, torch.autograd.grad(same, (x, weight), upstream), strict=True):
        torch.testing.assert_close(a, b)
    if len(shape) == 2:
        torch.library.opcheck(
            torch.ops.aerogel.nm_linear_bidirectional.default, (x, weight, m_f, m_b)
        )


def test_misuse_of_the_bidirectional_operator_is_named():
    x, w, mask = torch.randn(3, 8), torch.randn(4, 8), torch.ones(4, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"x must be \(\*, in\) and w \(out, in\)"):
        nm_linear_bidirectional(torch.randn(3, 4), w, mask, mask)
    with pytest.raises(ValueError, match=r"got torch.float64 \(3, 8\) and torch.float32"):
        nm_linear_bidirectional(x.double(), w, mask, mask)
    with pytest.raises(ValueError, match=r"m_b must be bool \(4, 8\), got torch.bool \(8, 4\)"):
        nm_linear_bidirectional(x, w, mask, mask.t())
    with pytest.raises(ValueError, match=r"mask must be bool \(4, 8\), got torch.float32"):
        nm_mask_(w, w, 2, 4)
    with pytest.raises(ValueError, match="3 does not divide the 8 channels of 'score'"):
        nm_mask_(mask, w, 1, 3)


@pytest.mark.parametrize(
    ("dims", "geometry"),
    [
        (1, {"stride": (2,), "padding": (1,), "dilation": (1,)}),
        (2, {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
        (3, {"stride": (1, 1, 1), "padding": (0, 0, 0), "dilation": (1, 1, 1)}),
    ],
)
def test_bidirectional_convolution_against_hand_formulas(dims, geometry):
    torch.manual_seed(0)
    sides = {1: [6], 2: [4, 4], 3: [2, 3, 2]}[dims]
    x = torch.randn(1, 2, *sides, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, *[2] * dims, dtype=torch.float64, requires_grad=True)
    forward, backward = torch.rand(weight.shape) < 0.5, torch.rand(weight.shape) < 0.5
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    y = bidirectional_conv(x, weight, forward, backward, None, *geometry.values())
    assert torch.allclose(y, conv(x, weight * forward, **geometry))
    upstream = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, weight), upstream)
    through_backward = conv(x, weight * backward, **geometry)
    assert torch.allclose(dx, gradient_of(through_backward, x, upstream))
    dense = conv(x, weight, **geometry)
    assert torch.allclose(dw, gradient_of(dense, weight, upstream))
    same = weight.detach()
    shape = tuple(geometry.values())
    assert torch.autograd.gradcheck(
        lambda v: bidirectional_conv(v, same, forward, forward, None, *shape), x
    )


@pytest.mark.parametrize(
    "padding", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}]
)
def test_bidirectional_layers_keep_their_padding(padding):
    layer = nn.Conv2d(4, 4, 3, **padding)
    plain = copy.deepcopy(layer)
    controller = one_step_controller(layer, Bidirectional(NM(4, 4, axis=0)), NM(4, 4))
    x = torch.randn(1, 4, 6, 6)
    assert torch.allclose(layer(x), plain(x))
    controller.finalize()
    assert type(layer) is nn.Conv2d
    assert list(layer.state_dict()) == list(plain.state_dict())


def one_step_controller(model, coupling, pattern=None):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule = Rebuild() if pattern is None else Rebuild(pattern=pattern)
    schedule = Constant(0.5 if pattern is None else 1 - pattern.fixed_density)
    return MaskController(
        model, optimizer, select_parameters(model), coupling, "uniform", schedule, rule
    )


def test_bidirectional_masks_are_nm_along_their_axes_and_follow_the_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    controller = one_step_controller(model, Bidirectional(NM(1, 4, axis=0)), NM(1, 4))
    seen = []
    for _ in range(3):
        controller.optimizer.zero_grad()
        model(torch.randn(16, 8)).square().sum().backward()
        controller.step()
        layer = model[0]
        assert NM(1, 4).is_satisfied(layer.mask_forward, exact=True)
        assert NM(1, 4, axis=0).is_satisfied(layer.mask_backward, exact=True)
        assert torch.equal(layer.mask_backward, NM(1, 4, axis=0).select(layer.weight.abs()))
        seen.append(layer.mask_forward.clone())
    assert not torch.equal(seen[0], seen[-1])


def test_bidirectional_refuses_what_it_cannot_mask():
    with pytest.raises(ValueError, match="groups=1"):
        one_step_controller(nn.Conv2d(8, 8, 3, groups=8), Bidirectional(), NM(1, 1))
    with pytest.raises(ValueError, match="plain Linear"):
        model = nn.Embedding(8, 8)
        MaskController(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            select_parameters(model, types=(nn.Embedding,)),
            Bidirectional(),
        )


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_couplings_compile(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    controller = one_step_controller(model, kind)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(5, 6)
    for _ in range(3):
        controller.optimizer.zero_grad()
        output = compiled(x)
        assert torch.allclose(output, model(x))
        output.square().sum().backward()
        by_graph = model[0].parametrizations.weight.original.grad.clone()
        controller.optimizer.zero_grad()
        model(x).square().sum().backward()
        assert torch.allclose(by_graph, model[0].parametrizations.weight.original.grad)
        controller.step()


def test_bidirectional_layers_compile():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    controller = one_step_controller(model, Bidirectional(NM(1, 4, axis=0)), NM(1, 4))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 4, 4, 4)
    for _ in range(2):
        controller.optimizer.zero_grad()
        compiled(x).square().sum().backward()
        by_graph = model[0].weight.grad.clone()
        controller.optimizer.zero_grad()
        model(x).square().sum().backward()
        assert torch.allclose(by_graph, model[0].weight.grad, atol=1e-6)
        controller.step()


def masked_step(coupling, optimizer_of=lambda p: torch.optim.SGD(p, 0.1), steps=1):
    """One layer with a fixed mask, its gradient upstream of ones; returns before and after."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=False)
    mask = torch.rand(4, 5) < 0.5
    optimizer = optimizer_of(layer.parameters())
    controller = MaskController(
        layer, optimizer, select_parameters(layer), coupling, masks=MaskSet({"weight": mask})
    )
    leaf = controller.selection["weight"].parameter
    before = leaf.detach().clone()
    x = torch.randn(3, 5)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).sum().backward()
        controller.step()
    gradient = torch.ones(3, 4).t() @ x
    return before, leaf.detach(), gradient, mask


def test_sr_ste_adds_lambda_times_the_masked_weight():
    before, after, gradient, mask = masked_step(SRSTE(lam=0.5))
    expected = before - 0.1 * (gradient + 0.5 * torch.where(mask, 0, before))
    assert torch.allclose(after, expected)


def test_decoupled_sr_ste_decays_beside_the_optimizer():
    before, after, gradient, mask = masked_step(SRSTE(lam=0.5, decoupled=True))
    stepped = before - 0.1 * gradient
    assert torch.allclose(after, torch.where(mask, stepped, stepped * (1 - 0.1 * 0.5)))


def test_ste_trains_masked_weights_too():
    before, after, gradient, _ = masked_step(STE())
    assert torch.allclose(after, before - 0.1 * gradient)


def test_shrink_multiplies_masked_weights_only():
    before, after, gradient, mask = masked_step(Shrink(0.9))
    stepped = before - 0.1 * gradient
    assert torch.allclose(after[mask], stepped[mask])
    assert torch.allclose(after[~mask], stepped[~mask] * 0.9)


def test_shrunken_weights_become_zero_before_they_become_denormal():
    leaf = nn.Parameter(torch.tensor([1e-19, 1e-25, 1.0]))
    with torch.no_grad():
        Shrink(0.5).after_step(leaf, Keep(torch.tensor([False, False, True]), leaf), 0.0)
    assert leaf.tolist() == [pytest.approx(5e-20), 0.0, 1.0]


@pytest.mark.parametrize("kind", ["ste", "soft", "sr_ste"])
def test_masks_are_spread_to_bits_only_where_they_are_used(kind, monkeypatch):
    made = []
    monkeypatch.setattr(
        masked_parameters, "Keep", lambda mask, like: made.append(1) or Keep(mask, like)
    )
    masked_step(make_coupling(kind), lambda p: torch.optim.SGD(p, 0.1))
    assert bool(made) == (kind == "sr_ste")


def test_hard_zeroes_weights_gradients_and_state():
    _, after, _, mask = masked_step(
        make_coupling("hard"), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1), steps=3
    )
    assert bool((after[~mask] == 0).all())
    assert bool((after[mask] != 0).all())


@pytest.mark.parametrize("reset", [False, True])
def test_hard_dense_grad_keeps_adams_moments_warm(reset):
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    mask = torch.rand(4, 5) < 0.5
    for optimizer in (
        torch.optim.Adam(layer.parameters()),
        torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9),
    ):
        controller = MaskController(
            layer,
            optimizer,
            select_parameters(layer),
            COUPLINGS["hard_dense_grad"](reset_state=reset),
            masks=MaskSet({"weight": mask}),
        )
        layer(torch.randn(3, 5)).square().sum().backward()
        controller.step()
        assert bool((layer.weight[~mask] == 0).all())
        state = optimizer.state[layer.weight]
        if "exp_avg" in state:
            assert bool((state["exp_avg"][~mask] == 0).all()) == reset
        else:
            assert bool((state["momentum_buffer"][~mask] == 0).all())
        controller.finalize()


def test_soft_beta_follows_its_schedule():
    from aerogel.sparsity import Linear as LinearSchedule

    layer = nn.Linear(4, 4, bias=False)
    mask = torch.eye(4, dtype=torch.bool)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    controller = MaskController(
        layer,
        optimizer,
        select_parameters(layer),
        Soft(LinearSchedule(0.25)),
        masks=MaskSet({"weight": mask}),
    )
    stored = controller.selection["weight"].parameter.detach()
    for beta in (1.0, 0.75, 0.5, 0.25, 0.0, 0.0):
        assert torch.allclose(layer.weight, stored * (mask + beta * ~mask))
        layer(torch.randn(2, 4)).sum().backward()
        controller.step()


def test_tied_weights_share_one_mask_everywhere():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    selection = select_parameters(model, include=("*",))
    mask = torch.rand(7, 5) < 0.5
    controller = MaskController(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        selection,
        Frozen(),
        masks=MaskSet({"embed.weight": mask}),
    )
    assert bool((model.embed.weight[~mask] == 0).all())
    assert torch.equal(model.embed.weight, model.head.weight)
    controller.finalize()
    assert model.embed.weight is model.head.weight
    assert bool((model.head.weight[~mask] == 0).all())


def test_finalize_leaves_other_parametrizations_on():
    from torch.nn.utils import parametrize

    class Round(nn.Module):
        def forward(self, weight):
            return (weight * 8).round() / 8

    layer = nn.Linear(4, 4)
    ref = select_parameters(layer)["weight"]
    mask = torch.rand(4, 4) < 0.5
    attach_parametrization(ref, MaskedWeight(mask))
    parametrize.register_parametrization(layer, "weight", Round())
    before = layer.weight.detach().clone()
    detach_parametrization(ref, mask)
    assert torch.equal(layer.weight, before)
    assert len(layer.parametrizations.weight) == 1


def test_unknown_couplings_list_the_nearest():
    with pytest.raises(ValueError, match=r"frozne.*frozen"):
        make_coupling("frozne")
    with pytest.raises(ValueError, match="alpha"):
        Shrink(1.5)
    with pytest.raises(ValueError, match="grad"):
        Soft(grad="both")


@pytest.mark.parametrize("kind", ["hard", "hard_dense_grad"])
def test_weights_changed_behind_everybodys_back_are_zero_after_the_next_step(kind):
    torch.manual_seed(0)
    layer, mask = nn.Linear(40, 30), torch.rand(30, 40) < 0.2
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    selection = select_parameters(layer)
    controller = MaskController(layer, optimizer, selection, kind, masks=MaskSet({"weight": mask}))
    for change in ("nothing", "data", "in place", "numpy", "nan"):
        optimizer.zero_grad()
        layer(torch.randn(8, 40)).sum().backward()
        if change == "data":
            layer.weight.data.add_(1.0)
        elif change == "in place":
            with torch.no_grad():
                layer.weight.sub_(1.0)
        elif change == "numpy":
            layer.weight.detach().numpy()[:] = 3.0
        elif change == "nan":
            layer.weight.data[~mask] = torch.nan
        controller.step()
        assert bool((layer.weight[~mask] == 0).all()), change
