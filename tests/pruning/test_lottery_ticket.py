"""Lottery tickets, promise by promise."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import aerogel
from aerogel.models import LeNet300
from aerogel.pruning import LotteryTicket, StaticSparseTrainer, TrainOutcome
from aerogel.pruning.lottery_ticket import METHOD
from aerogel.pruning.method import Goal
from aerogel.sparsity import MaskSet, Snapshot, magnitude_

STEPS = 12


def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.ReLU(),
        nn.Linear(12, 3),
    )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 1, 4, 4, generator=generator)
    return x, torch.randint(0, 3, (8,), generator=generator)


def train(model, masks, start=0, snapshot_at=None, *, watch=None, optimizer=None):
    make = optimizer or (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01))
    stepped = StaticSparseTrainer(model, make(model.parameters()), masks)
    snapshot = None
    for step in range(start, STEPS):
        if step == snapshot_at:
            snapshot = Snapshot.capture(model, step=step)
        x, y = batch(step)
        stepped.controller.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        stepped.step()
        if watch is not None:
            watch(model, stepped)
    stepped.finalize()
    return TrainOutcome(STEPS, {"loss": 1.0 + start}, snapshot)


def search(train_fn=train, **options):
    return LotteryTicket(net, train_fn, **{"rounds": 3, "rate": 0.3, **options})


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_are_nested_and_the_alive_counts_follow_the_recurrence(scope):
    found = search(scope=scope, rounds=4).run().rounds
    assert [r.round for r in found] == [0, 1, 2, 3, 4]
    assert found[0].density == 1.0
    for before, after in pairwise(found):
        assert not any(bool((m & ~before.masks[n]).any()) for n, m in after.masks.items())
        old, new = counts(before.masks), counts(after.masks)
        if scope == "global":
            total = sum(old.values())
            assert sum(new.values()) == total - round(0.3 * total)
        else:
            rates = {"0.weight": 0.3, "4.weight": 0.3, "6.weight": 0.15}
            assert new == {n: old[n] - round(rates[n] * old[n]) for n in old}


def test_each_round_prunes_the_smallest_of_the_alive_weights():
    found = search().run().rounds
    for before, after in pairwise(found):
        for name, mask in after.masks.items():
            weight = before.final_state[name].abs()
            gone = before.masks[name] & ~mask
            assert float(weight[gone].max()) <= float(weight[mask].min())


@settings(max_examples=10, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(1, 5), st.sampled_from(["layer", "global"]))
def test_no_layer_ever_vanishes(rate, rounds, scope):
    def untrained(model, masks, start, snapshot_at):
        with torch.no_grad():
            model[6].weight.mul_(1e-6)  # loses every global comparison
        return TrainOutcome(1)

    found = search(untrained, rounds=rounds, rate=rate, scope=scope).run().rounds
    assert min(min(counts(r.masks).values()) for r in found) >= 1


def test_rates_go_by_layer_and_the_last_layer_takes_half():
    ticket = search(rate={"0": 0.1, "*": 0.4})
    assert ticket.rates == {"0.weight": 0.1, "4.weight": 0.4, "6.weight": 0.2}
    assert search(output_rate=0.05).rates["6.weight"] == 0.05
    assert search(exclude=("6",)).rates == {"0.weight": 0.3, "4.weight": 0.3}


@pytest.mark.parametrize("rewind_to", [0, 4])
def test_a_ticket_is_the_start_bit_for_bit_under_its_mask(rewind_to):
    seen, snapshots = [], []

    def recorded(model, masks, start, snapshot_at):
        seen.append((start, copy.deepcopy(model.state_dict())))
        outcome = train(model, masks, start, snapshot_at)
        snapshots.append(outcome.snapshot)
        return outcome

    ticket = search(recorded, rewind_to=rewind_to, rounds=2)
    ticket.run()
    start = seen[0][1]
    if rewind_to:
        snapshot = snapshots[0]
        start = {**snapshot.params, **snapshot.buffers}
        assert int(start["1.num_batches_tracked"]) == rewind_to
    for number in (1, 2):
        state, masks = ticket.winning_ticket(number)
        assert seen[number][0] == rewind_to
        for name, value in start.items():
            wanted = torch.where(masks[name], value, 0.0) if name in masks else value
            assert torch.equal(state[name], wanted), name
            assert torch.equal(seen[number][1][name], wanted), name


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_pruned_weights_and_their_optimizer_state_are_zero_after_every_step(optimizer):
    looked = []

    def watch(model, stepped):
        for name, mask in stepped.masks.items():
            parameter = model.get_parameter(name)
            assert bool((parameter[~mask] == 0).all())
            for value in stepped.controller.optimizer.state[parameter].values():
                if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    assert bool((value[~mask] == 0).all())
            looked.append(int((~mask).sum()))

    search(lambda *a: train(*a, watch=watch, optimizer=optimizer)).run()
    assert max(looked) > 0


def test_round_0_is_a_plain_dense_training():
    dense = search(rounds=1).run().rounds[0]
    ticket = search(rounds=1)
    ticket.run()
    model = net()
    model.load_state_dict(ticket.winning_ticket(0)[0])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, dense.final_state[name]), name


def test_new_initial_values_keep_the_mask_and_change_every_weight_kept():
    ticket = search()
    ticket.run()
    (start, masks), (drawn, same) = ticket.winning_ticket(2), ticket.random_reinit(2, seed=9)
    assert same == masks
    for name, mask in masks.items():
        assert bool((drawn[name][~mask] == 0).all())
        assert bool((drawn[name][mask] != start[name][mask]).all())
    again = ticket.random_reinit(2, seed=9)[0]
    assert all(torch.equal(again[n], drawn[n]) for n in drawn)


def test_a_shuffled_mask_keeps_layer_counts_and_initial_values():
    ticket = search()
    ticket.run()
    masks = ticket.winning_ticket(2)[1]
    state, shuffled = ticket.shuffled_mask(2, seed=1)
    dense = ticket.winning_ticket(0)[0]
    assert counts(shuffled) == counts(masks)
    assert shuffled != masks
    for name, mask in shuffled.items():
        assert torch.equal(state[name], torch.where(mask, dense[name], 0.0))


@pytest.mark.parametrize("keep_sign", [False, True])
def test_reused_values_come_from_the_layers_survivors(keep_sign):
    ticket = search()
    ticket.run()
    start, masks = ticket.winning_ticket(2)
    state, same = ticket.reuse(2, seed=3, keep_sign=keep_sign)
    assert same == masks
    for name, mask in masks.items():
        old, new = start[name][mask], state[name][mask]
        assert set(new.abs().tolist()) <= set(old.abs().tolist())
        assert bool((state[name][~mask] == 0).all())
        if keep_sign:
            assert torch.equal(new.sign(), old.sign())
        elif name == "4.weight":
            assert not torch.equal(new.sign(), old.sign())


def test_one_shot_is_one_round_at_the_wanted_sparsity():
    ticket = search(rounds=1, rate=0.8, output_rate=0.8)
    dense = ticket.run().rounds[0]
    model = net()
    model.load_state_dict(dense.final_state)
    assert ticket.winning_ticket(1)[1] == magnitude_(model, 0.8)


def test_the_second_strategy_resets_only_before_the_last_round():
    starts = []

    def recorded(model, masks, start, snapshot_at):
        starts.append(copy.deepcopy(model.state_dict()))
        return train(model, masks, start, snapshot_at)

    ticket = search(recorded, reset="at_end")
    found = ticket.run().rounds
    for number in (1, 2):
        before, masks = found[number - 1].final_state, found[number].masks
        for name, mask in masks.items():
            assert torch.equal(starts[number][name], torch.where(mask, before[name], 0.0))
    last = ticket.winning_ticket(3)[0]
    assert all(torch.equal(last[n], starts[3][n]) for n in last)


@pytest.mark.parametrize("rewind_to", [0, 4])
def test_a_killed_search_goes_on_at_the_unfinished_round(tmp_path, rewind_to):
    options = {"rewind_to": rewind_to, "rounds": 4}
    whole = search(**options).run().rounds
    trained = []

    def until_killed(model, masks, start, snapshot_at):
        trained.append(masks.nnz)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(model, masks, start, snapshot_at)

    with pytest.raises(KeyboardInterrupt):
        search(until_killed, run_dir=tmp_path, **options).run()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "round-000.safetensors",
        "round-001.safetensors",
    ]
    resumed = search(until_killed, run_dir=tmp_path, **options)
    found = resumed.run().rounds
    assert len(trained) == 6  # rounds 0, 1, 2 (killed), 2, 3, 4
    for a, b in zip(whole, found, strict=True):
        assert a.masks == b.masks
        assert (a.metrics, a.steps, a.density) == (b.metrics, b.steps, b.density)
        assert all(torch.equal(a.final_state[n], b.final_state[n]) for n in a.final_state)
    third = search(until_killed, run_dir=tmp_path, **options)
    assert third.winning_ticket(4)[1] == resumed.winning_ticket(4)[1]
    third.run()
    assert len(trained) == 6


def test_a_folder_of_another_run_is_refused(tmp_path):
    search(run_dir=tmp_path).run()
    search(run_dir=tmp_path, rounds=5)  # more rounds continue it
    with pytest.raises(ValueError, match="another run: rates"):
        search(run_dir=tmp_path, rate=0.2)
    with pytest.raises(ValueError, match="another run: scope"):
        search(run_dir=tmp_path, scope="global")
    with pytest.raises(ValueError, match="initial weights differ"):
        search(run_dir=tmp_path, generator=torch.Generator().manual_seed(5))
    path = tmp_path / "round-001.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="round-001"):
        search(run_dir=tmp_path)


def test_masks_of_another_architecture_are_refused(tmp_path):
    def no_training(model, masks, start, snapshot_at):
        return TrainOutcome(1)

    def wide():
        return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))

    def narrow():
        return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    LotteryTicket(wide, no_training, rounds=1, run_dir=tmp_path).run()
    with pytest.raises(ValueError, match="another"):
        LotteryTicket(narrow, no_training, rounds=1, run_dir=tmp_path)
    with pytest.raises(ValueError, match="shape"):
        train(narrow(), MaskSet({"0.weight": torch.ones(9, 6, dtype=torch.bool)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, r"rate must be in \(0, 1\), got"),
        ({"rate": 1.0}, r"rate must be in \(0, 1\), got"),
        ({"rate": {"*": 1.5}}, r"rate\['\*'\] must be in \(0, 1\), got 1.5"),
        ({"output_rate": 0.0}, "output_rate"),
        ({"rounds": 0}, "rounds"),
        ({"rewind_to": -1}, "rewind_to"),
        ({"scope": "row"}, "scope"),
        ({"reset": "never"}, "reset"),
        ({"exclude": ("*",)}, "no parameter selected"),
        ({"scope": "global", "rate": {"*": 0.2}}, "global"),
        ({"scope": "global", "output_rate": 0.1}, "global"),
        ({"rate": {"0": 0.2}}, r"4\.weight"),
        ({"rate": {"*": 0.2, "nothing": 0.1}}, "nothing"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        search(**options)


def test_a_model_that_is_not_a_function_of_the_seed_is_refused():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="different weights from the same seed"):
        LotteryTicket(
            lambda: (
                nn.utils.skip_init(nn.Linear, 4, 2).requires_grad_()
                if generator.initial_seed() < 0
                else _drawn(generator)
            ),
            train,
            rounds=1,
        )


def _drawn(generator):
    model = nn.Linear(4, 2)
    nn.init.normal_(model.weight, generator=generator)
    return model


def test_a_model_that_ignores_the_seed_gives_no_control():
    fixed = net().state_dict()

    def same():
        model = net()
        model.load_state_dict(fixed)
        return model

    ticket = LotteryTicket(same, train, rounds=1)
    ticket.run()
    with pytest.raises(ValueError, match="same initial weights"):
        ticket.random_reinit(1, seed=4)


def test_training_functions_that_break_the_rules_are_told_so():
    def forgets_masks(model, masks, start, snapshot_at):
        with torch.no_grad():
            model[4].weight.add_(1.0)
        return TrainOutcome(1)

    with pytest.raises(ValueError, match=r"moved pruned weights of '4\.weight'"):
        search(forgets_masks).run()
    lengths = iter((5, 6))
    with pytest.raises(ValueError, match="6 steps, 5 before"):
        search(lambda *a: TrainOutcome(next(lengths))).run()
    with pytest.raises(ValueError, match="no snapshot at rewind_to=3"):
        search(lambda *a: TrainOutcome(STEPS), rewind_to=3).run()
    with pytest.raises(ValueError, match="rewind_to must be below the 12 steps"):
        search(rewind_to=STEPS).run()


def test_rounds_that_were_not_reached_are_named():
    ticket = search(rewind_to=3)
    with pytest.raises(ValueError, match="round must be in"):
        ticket.winning_ticket(1)
    with pytest.raises(ValueError, match="not captured yet"):
        ticket.winning_ticket(0)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ticket = search()
    ticket.run()
    ticket.random_reinit(1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trained_ticket_compiles_to_the_same_outputs(tmp_path):
    def perceptron():
        return LeNet300(img_size=6)

    def untrained(model, masks, start, snapshot_at):
        return TrainOutcome(1)

    ticket = LotteryTicket(perceptron, untrained, rounds=5, rate=0.4)
    last = ticket.run().rounds[-1]
    model = perceptron()
    model.load_state_dict(last.final_state)
    model.eval()
    assert MaskSet.from_weights(model) == last.masks
    x = torch.randn(16, 1, 6, 6)
    compiled = aerogel.compile(model, (x,))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


class FewTrainings:
    """The means to train, without the training floor."""

    def __init__(self, folder):
        self.folder, self.names = folder, []

    def fresh(self, seed):
        torch.manual_seed(seed)
        return net()

    def trained(self):
        return self.fresh(0)

    def train(self, model, masks, name, seed):
        self.names.append(name)
        train(model, masks)
        return 0.5


def test_the_method_ends_at_the_wanted_sparsity_and_trains_each_round_once(tmp_path):
    goal = Goal(
        parameters=("0.weight", "4.weight"),
        sparsity=0.75,
        pattern="unstructured",
        steps=STEPS,
        begin=0.0,
        end=1.0,
        initial_sparsity=0.0,
        updates=1,
        power=3.0,
    )
    trainings = FewTrainings(tmp_path)
    model = METHOD.search(trainings, goal)
    masks = MaskSet.from_weights(model)
    assert masks["6.weight"].all()
    for name in goal.parameters:
        assert masks.layer_density()[name] == pytest.approx(0.25, abs=0.03)
    assert len(trainings.names) == len(set(trainings.names)) == 8
    again = METHOD.search(trainings, goal)
    assert len(trainings.names) == 8
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )
