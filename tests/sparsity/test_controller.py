"""The order of a training step, and everything that must survive it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aerogel.nested import load_state, save_state
from aerogel.sparsity import (
    NM,
    SRSTE,
    Constant,
    Cosine,
    Cubic,
    DropGrow,
    Filter,
    Frozen,
    MaskController,
    MaskSet,
    OneShot,
    Rebuild,
    Shrink,
    Soft,
    build_masks,
    random_masks,
    select_parameters,
)
from aerogel.sparsity import Exponential as ExponentialSchedule

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, weight_decay=0.01),
}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def batch(step, size=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(0, 3, (size,), generator=generator)


def train(model, controller, steps, first=0):
    for step in range(first, first + steps):
        x, y = batch(step)
        controller.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        controller.step()


def ramp(model, coupling="frozen", optimizer="sgd", **options):
    return MaskController(
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        select_parameters(model),
        coupling,
        "uniform",
        Cubic(0.0, 0.8, begin=2, n=4, every=3),
        Rebuild(),
        **options,
    )


def rigl(model, growth="gradient", optimizer="sgd", **options):
    selection = select_parameters(model)
    masks = random_masks(selection, 0.4, generator=torch.Generator().manual_seed(1))
    return MaskController(
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        selection,
        "hard",
        "uniform",
        Cosine(0.3, 0, 40, every=5),
        DropGrow(growth, gradient_window=2),
        masks=masks,
        **options,
    )


SET_UPS = {
    "frozen": lambda m: ramp(m),
    "frozen in place": lambda m: ramp(m, Frozen(in_place=True), "adamw"),
    "hard": lambda m: ramp(m, "hard", "rmsprop"),
    "hard_dense_grad": lambda m: ramp(m, "hard_dense_grad", "adamw"),
    "ste": lambda m: ramp(m, "ste"),
    "sr_ste": lambda m: ramp(m, SRSTE(0.1)),
    "soft": lambda m: ramp(m, Soft(ExponentialSchedule(0.2), "chain")),
    "shrink": lambda m: ramp(m, Shrink(0.9)),
    "rigl": lambda m: rigl(m),
    "set": lambda m: rigl(m, "random", "adamw"),
    "unfired": lambda m: rigl(m, "random_unfired"),
    "momentum growth": lambda m: rigl(m, "momentum", "adamw"),
}


@pytest.mark.parametrize("kind", SET_UPS)
@pytest.mark.parametrize("stop", [1, 6, 15])
def test_resuming_is_bit_identical_at_every_phase(kind, stop, tmp_path):
    straight = net()
    whole = SET_UPS[kind](straight)
    train(straight, whole, 22)

    first = net()
    controller = SET_UPS[kind](first)
    train(first, controller, stop)
    save_state(controller.state_dict(), tmp_path / "controller")
    saved = copy.deepcopy((first.state_dict(), controller.optimizer.state_dict()))
    del controller

    second = net(seed=9)
    resumed = SET_UPS[kind](second)
    second.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(load_state(tmp_path / "controller"))
    train(second, resumed, 22 - stop, first=stop)

    assert resumed.masks == whole.masks
    for name, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("coupling", ["frozen", Frozen(in_place=True)])
def test_frozen_values_do_not_move_between_updates(optimizer, coupling):
    model = net()
    controller = ramp(model, coupling, optimizer)
    before, last_masks = None, None
    for step in range(25):
        train(model, controller, 1, first=step)
        stored = {name: value.clone() for name, value in controller.stored_weights().items()}
        masks = controller.masks.clone()
        if before is not None and last_masks == masks:
            for name, mask in masks.items():
                assert torch.equal(stored[name][~mask], before[name][~mask])
        before, last_masks = stored, masks
        for name, parameter in controller.selection.parameters().items():
            for value in controller.optimizer.state[parameter].values():
                if value.shape == parameter.shape:
                    assert bool((value[~masks[name]] == 0).all())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_in_place_frozen_training_equals_the_parametrized_one(optimizer):
    models = [net(), net()]
    for model, coupling in zip(models, ["frozen", Frozen(in_place=True)], strict=True):
        controller = ramp(model, coupling, optimizer)
        train(model, controller, 20)
        controller.finalize()
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hard_masked_weights_and_state_are_zero_after_every_step(optimizer):
    model = net()
    controller = rigl(model, optimizer=optimizer)
    for step in range(20):
        train(model, controller, 1, first=step)
        for name, parameter in controller.selection.parameters().items():
            mask = controller.masks[name]
            assert bool((parameter[~mask] == 0).all())
            for value in controller.optimizer.state[parameter].values():
                if value.shape == parameter.shape:
                    assert bool((value[~mask] == 0).all())


@pytest.mark.parametrize("growth", ["gradient", "random", "random_unfired"])
def test_dynamic_training_keeps_its_count_and_explores(growth):
    model = net()
    controller = rigl(model, growth)
    nnz, rates = controller.masks.nnz, []
    for step in range(30):
        train(model, controller, 1, first=step)
        assert controller.masks.nnz == nnz
        rates.append(controller.fired_rate())
    assert rates == sorted(rates)
    assert rates[-1] > rates[0] == pytest.approx(controller.masks.density())


def test_growth_sees_the_dense_gradient_of_the_step_before_the_optimizer():
    model = net()
    controller = rigl(model)
    controller.rule.gradient_window = 1
    train(model, controller, 5)
    twin = net()
    twin.load_state_dict(model.state_dict())
    x, y = batch(5)
    F.cross_entropy(twin(x), y).backward()
    seen = {}
    update = controller.rule.update
    controller.rule.update = lambda ctx: seen.update(ctx.gradients) or update(ctx)
    train(model, controller, 1, first=5)
    for name, gradient in seen.items():
        assert torch.equal(gradient, twin.get_parameter(name).grad)


def backward(model, step, parts=1):
    x, y = batch(step)
    for piece, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (F.cross_entropy(model(piece), labels) / parts).backward()


def zeros_outside(controller):
    return all(
        bool((parameter.grad[~controller.masks[name]] == 0).all())
        for name, parameter in controller.selection.parameters().items()
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_are_masked_as_they_arrive_and_dense_only_for_an_update(parts):
    model = net()
    controller = rigl(model)
    controller.rule.gradient_window = 1
    for step in range(11):
        controller.optimizer.zero_grad()
        backward(model, step, parts)
        twin = copy.deepcopy(model)
        twin.zero_grad()
        backward(twin, step, parts)
        dense = {name: twin.get_parameter(name).grad for name in controller.selection}
        due = step in (5, 10)
        assert controller.due == due
        for name, mask in controller.masks.items():
            wanted = dense[name] if due else dense[name] * mask
            assert torch.equal(model.get_parameter(name).grad, wanted)
        if due:
            controller.mask_gradients()
            assert zeros_outside(controller)
            assert all(torch.equal(controller._captured[name], dense[name]) for name in dense)
        controller.step()


@pytest.mark.parametrize("follow", [False, True])
def test_clipping_after_masking_changes_only_the_length(follow):
    plain, clipped = net().double(), net().double()
    by_hand, masked = rigl(plain), rigl(clipped)
    if follow:
        masked.follow_optimizer()
    for step in range(12):
        x, y = batch(step)
        for model, controller in ((plain, by_hand), (clipped, masked)):
            controller.optimizer.zero_grad()
            F.cross_entropy(model(x.double()), y).backward()
        masked.mask_gradients()
        assert zeros_outside(masked)
        nn.utils.clip_grad_norm_(clipped.parameters(), 1e9)
        by_hand.step()
        masked.optimizer.step() if follow else masked.step()
    assert masked.masks == by_hand.masks
    for a, b in zip(plain.parameters(), clipped.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_given_up_after_masking_leaves_no_stale_gradient():
    model = net()
    controller = rigl(model)
    controller.rule.gradient_window = 1
    train(model, controller, 5)
    controller.optimizer.zero_grad()
    backward(model, 77)
    controller.mask_gradients()
    controller.optimizer.zero_grad()
    backward(model, 5)
    dense = {name: p.grad.clone() for name, p in controller.selection.parameters().items()}
    controller.mask_gradients()
    assert all(torch.equal(controller._captured[name], dense[name]) for name in dense)


def test_frozen_layers_and_copies_are_left_alone():
    model = net()
    model[0].weight.requires_grad_(False)
    controller = rigl(model, "random")
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(batch(0)[0]), batch(0)[1]).backward()
    assert bool((twin[2].weight.grad[~controller.masks["2.weight"]] != 0).any())
    train(model, controller, 6)
    assert model[0].weight.grad is None


def test_grown_weights_start_at_zero():
    model = net()
    controller = rigl(model)
    train(model, controller, 5)
    before = controller.masks.clone()
    train(model, controller, 1, first=5)
    for name, mask in controller.masks.items():
        grown = mask & ~before[name]
        assert bool(grown.any())
        assert bool((model.get_parameter(name)[grown] == 0).all())


def test_update_may_replace_the_optimizer_step():
    model = net()
    controller = rigl(model, update_replaces_step=True)
    train(model, controller, 5)
    bias = model[0].bias.detach().clone()
    masks = controller.masks.clone()
    train(model, controller, 1, first=5)
    assert controller.masks != masks
    assert torch.equal(model[0].bias, bias)
    assert controller.t == 6


def test_a_filter_masked_run_equals_a_smaller_network():
    """Masked training of rows is training of the network without those rows."""
    torch.manual_seed(0)
    big = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    selection = select_parameters(big, include=("0",))
    scores = {"0.weight": selection["0.weight"].parameter.detach().abs()}
    masks = build_masks(scores, 0.5, Filter())
    rows = masks["0.weight"].all(dim=1)
    with torch.no_grad():
        big[0].bias[~rows] = 0
        big[2].weight[:, ~rows] = 0
    small = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        small[0].weight.copy_(big[0].weight[rows])
        small[0].bias.copy_(big[0].bias[rows])
        small[2].weight.copy_(big[2].weight[:, rows])
        small[2].bias.copy_(big[2].bias)
    # The bias and the consumers of a removed row go with it.
    everything = select_parameters(big, biases=True)
    full = MaskSet.ones(everything)
    full["0.weight"] = masks["0.weight"]
    full["0.bias"] = rows
    full["2.weight"] = rows.expand(3, 16).contiguous()
    optimizers = [OPTIMIZERS["adamw"](m.parameters()) for m in (big, small)]
    controller = MaskController(big, optimizers[0], everything, "hard", masks=full)
    for step in range(10):
        x, y = batch(step)
        for model, optimizer in zip((big, small), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x.double()), y).backward()
        controller.step()
        optimizers[1].step()
        assert torch.allclose(big(x.double()), small(x.double()), atol=1e-12)
    assert torch.allclose(big[0].weight[rows], small[0].weight, atol=1e-12)


def test_gradient_accumulation_equals_one_large_batch():
    finals = []
    for parts in (1, 4):
        model = net().double()
        controller = rigl(model)
        for step in range(12):
            x, y = batch(step, size=16)
            controller.optimizer.zero_grad()
            for piece, labels in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(piece), labels) / parts).backward()
            controller.step()
        finals.append((controller.masks.clone(), model[0].weight.detach().clone()))
    assert finals[0][0] == finals[1][0]
    assert torch.allclose(finals[0][1], finals[1][1], atol=1e-12)


class FakeScaler:
    """A loss scaler of 8 on the CPU, which skips steps of infinite gradients like the real one."""

    def __init__(self):
        self.unscaled = False

    def unscale_(self, optimizer):
        if self.unscaled:
            raise RuntimeError("unscale_() has already been called")
        self.unscaled = True
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad.div_(8.0)

    def step(self, optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.unscaled = False
        if all(bool(torch.isfinite(g).all()) for g in gradients):
            optimizer.step()


@pytest.mark.parametrize("kind", ["rigl", "sr_ste", "frozen"])
def test_scaled_gradients_are_unscaled_before_anything_looks(kind):
    plain, scaled = net(), net()
    by_hand, with_scaler = SET_UPS[kind](plain), SET_UPS[kind](scaled)
    scaler = FakeScaler()
    train(plain, by_hand, 12)
    for step in range(12):
        x, y = batch(step)
        with_scaler.optimizer.zero_grad()
        (F.cross_entropy(scaled(x), y) * 8.0).backward()
        assert with_scaler.step(scaler)
    assert with_scaler.masks == by_hand.masks
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_skipped_for_infinite_gradients_changes_nothing():
    model = net()
    controller = rigl(model)
    train(model, controller, 5)
    before = copy.deepcopy(model.state_dict()), controller.masks.clone()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    assert controller.step(FakeScaler()) is False
    assert controller.t == 5
    assert controller.masks == before[1]
    assert all(torch.equal(value, before[0][n]) for n, value in model.state_dict().items())
    train(model, controller, 1, first=5)
    assert controller.t == 6


def test_bfloat16_autocast_trains_under_masks():
    model = net()
    controller = ramp(model)
    for step in range(16):
        x, y = batch(step)
        controller.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        controller.step()
    assert controller.masks.sparsity() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("kind", ["frozen", "rigl", "sr_ste", "soft"])
def test_following_the_optimizer_equals_stepping(kind):
    stepped, followed = net(), net()
    first, second = SET_UPS[kind](stepped), SET_UPS[kind](followed)
    train(stepped, first, 14)
    second.follow_optimizer()
    for step in range(14):
        x, y = batch(step)
        second.optimizer.zero_grad()
        F.cross_entropy(followed(x), y).backward()
        second.optimizer.step()
    assert first.masks == second.masks
    for a, b in zip(stepped.parameters(), followed.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match=r"optimizer\.step"):
        second.step()
    second.unfollow_optimizer()
    train(followed, second, 1, first=14)
    assert second.t == 15


def test_accelerate_wrappers_step_only_when_gradients_are_synchronised():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    model, optimizer = accelerator.prepare(model, OPTIMIZERS["sgd"](model.parameters()))
    controller = MaskController(
        model,
        optimizer,
        select_parameters(model),
        "frozen",
        "uniform",
        Cubic(0, 0.8, 0, 2, 1),
        Rebuild(),
    )
    taken = []
    for step in range(6):
        with accelerator.accumulate(model):
            x, y = batch(step)
            accelerator.backward(F.cross_entropy(model(x), y))
            taken.append(controller.step())
            optimizer.zero_grad()
    assert taken == [False, True] * 3
    assert controller.t == 3


@pytest.mark.parametrize("coupling", ["frozen", "hard", "hard_dense_grad"])
def test_recurrent_weights_are_masked_in_place(coupling):
    torch.manual_seed(0)
    model = nn.LSTM(5, 7, num_layers=2)
    names = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    selection = select_parameters(model, include=("weight_*",))
    controller = MaskController(
        model, optimizer, selection, coupling, "uniform", Cubic(0, 0.7, 1, 3, 2), Rebuild()
    )
    x = torch.randn(4, 3, 5)
    for _ in range(12):
        optimizer.zero_grad()
        model(x)[0].square().sum().backward()
        controller.step()
        for name, mask in controller.masks.items():
            assert bool((model.get_parameter(name)[~mask] == 0).all())
    assert controller.masks.sparsity() == pytest.approx(0.7, abs=0.01)
    before = model(x)[0]
    controller.finalize()
    assert list(model.state_dict()) == names
    assert torch.equal(model(x)[0], before)


def test_recurrent_masked_values_are_kept_and_saved():
    torch.manual_seed(0)
    model = nn.LSTM(5, 7)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    selection = select_parameters(model, include=("weight_*",))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    controller = MaskController(
        model, optimizer, selection, "frozen", "uniform", OneShot(0, 0.5), Rebuild()
    )
    model(torch.randn(4, 3, 5))[0].sum().backward()
    controller.step()
    held = controller.state_dict()["held"]
    for name, value in controller.stored_weights().items():
        assert torch.equal(value, start[name])
        assert torch.equal(held[name], start[name] * ~controller.masks[name])
        assert not torch.equal(model.get_parameter(name), start[name])


def test_recurrent_weights_refuse_couplings_that_need_a_parametrization():
    model = nn.LSTM(5, 7)
    with pytest.raises(ValueError, match="recurrent"):
        MaskController(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            select_parameters(model, include=("*",)),
            "ste",
        )


def test_a_parameter_has_one_controller_at_a_time():
    model = net()
    first = ramp(model, "hard")
    with pytest.raises(ValueError, match=r"0\.weight.*another mask controller"):
        ramp(model, "hard")
    first.finalize()
    second = ramp(model)
    with pytest.raises(RuntimeError, match="finalized"):
        first.step()
    second.finalize()


def test_a_refused_controller_leaves_no_trace():
    from torch.nn.utils import parametrize

    model = net()
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"2\.weight.*already parametrized"):
        ramp(model)
    assert not parametrize.is_parametrized(model[0])
    parametrize.remove_parametrizations(model[2], "weight")
    ramp(model)


@pytest.mark.parametrize("kind", ["frozen", "ste", "sr_ste", "hard", "frozen in place", "rigl"])
def test_finalized_output_is_the_masked_models_and_the_keys_are_dense(kind):
    model = net()
    keys = list(model.state_dict())
    order = [id(p) for p in model.parameters()]
    controller = SET_UPS[kind](model)
    train(model, controller, 18)
    x = batch(99)[0]
    before = model(x)
    masks = controller.finalize()
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == order
    kept = MaskSet.from_weights(model)
    assert (kept & masks) == kept
    assert kept == masks or kind == "rigl"  # what has just grown is zero until it learns


def test_bad_set_ups_are_refused():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    selection = select_parameters(model)
    wrong = MaskSet({n: torch.ones(2, 2, dtype=torch.bool) for n in selection})
    extra = MaskSet({**MaskSet.ones(selection), "3.weight": torch.ones(1, dtype=torch.bool)})
    cases = [
        (("frozen", "uniform", Cosine(0.3, 0, 9), DropGrow("gradient")), {}, "dense gradients"),
        (("hard", "uniform", Constant(0.5), None), {}, "belong together"),
        (("hard",), {"masks": wrong}, r"0\.weight.*shape"),
        (("hard",), {"masks": extra}, r"3\.weight"),
        (("hard",), {"masks": MaskSet()}, "no mask"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            MaskController(model, optimizer, selection, *arguments, **options)
    with pytest.raises(ValueError, match="does not train"):
        MaskController(model, OPTIMIZERS["sgd"](net().parameters()), selection, "hard")
    with pytest.raises(ValueError, match="update_replaces_step"):
        rigl(model, update_replaces_step=True).follow_optimizer()


def test_growth_without_gradients_names_the_tensor():
    model = net()
    controller = rigl(model)
    train(model, controller, 5)
    controller.optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"0\.weight.*no gradient"):
        controller.step()


def test_sparse_gradients_are_refused_by_name():
    model = nn.Embedding(9, 4, sparse=True)
    selection = select_parameters(model, types=(nn.Embedding,))
    controller = MaskController(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        selection,
        "hard",
        "uniform",
        Cosine(0.3, 0, 9),
        DropGrow("gradient"),
        masks=random_masks(selection, 0.5),
    )
    controller.t = 1
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"weight.*sparse"):
        controller.step()


def test_state_of_another_model_is_refused():
    controller = ramp(net())
    other = nn.Sequential(nn.Linear(6, 15), nn.ReLU(), nn.Linear(15, 3))
    state = ramp(other).state_dict()
    with pytest.raises(ValueError, match=r"0\.weight.*shape"):
        controller.load_state_dict(state)


def test_random_growth_is_the_same_in_every_process():
    masks = []
    for noise in (1, 2):
        model = net()
        controller = rigl(model, "random")
        torch.manual_seed(noise)  # what ranks differ in: the global generator
        train(model, controller, 12)
        masks.append(controller.masks.clone())
    assert masks[0] == masks[1]


def test_nm_training_recomputes_its_mask_every_step():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    selection = select_parameters(model)
    controller = MaskController(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        selection,
        "sr_ste",
        "nm",
        Constant(0.75),
        Rebuild(pattern=NM(1, 4)),
    )
    for _ in range(3):
        controller.optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        controller.step()
        for name, stored in controller.stored_weights().items():
            assert torch.equal(controller.masks[name], NM(1, 4).select(stored.abs()))


def test_saved_state_round_trips_and_damage_is_noticed(tmp_path):
    state = {
        "t": 3,
        "rate": 0.5,
        "name": "x",
        "none": None,
        "flag": True,
        "nested": {"w": torch.arange(3), "list": [1, {"v": torch.ones(2, dtype=torch.bool)}]},
    }
    path = tmp_path / "state"
    save_state(state, path)
    loaded = load_state(path)
    assert loaded["nested"]["w"].tolist() == [0, 1, 2]
    assert loaded["nested"]["list"][1]["v"].tolist() == [True, True]
    assert {k: loaded[k] for k in ("t", "rate", "name", "none", "flag")} == {
        "t": 3,
        "rate": 0.5,
        "name": "x",
        "none": None,
        "flag": True,
    }
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="state"):
        load_state(path)
    with pytest.raises(TypeError, match="/bad: object"):
        save_state({"bad": object()}, tmp_path / "other")
    with pytest.raises(TypeError, match="key"):
        save_state({(1, 2): 2}, tmp_path / "other")
    assert list(tmp_path.iterdir()) == [path]
