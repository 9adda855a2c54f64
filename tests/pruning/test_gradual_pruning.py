"""Gradual magnitude pruning, promise by promise."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aerogel.nested import load_state, save_state
from aerogel.pruning import GradualPruner
from aerogel.pruning.gradual_pruning import train_callback, trainer_callback
from aerogel.sparsity import Block, Frozen, MaskSet

QUICK = settings(max_examples=25, deadline=None)
WINDOW = {"begin_step": 2, "end_step": 14, "frequency": 3}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def train(model, pruner, steps, first=0):
    for step in range(first, first + steps):
        x, y = batch(step)
        pruner.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pruner.step()


@QUICK
@given(
    st.floats(0, 0.99),
    st.floats(0, 0.5),
    st.sampled_from(["frozen", "hard_dense_grad"]),
    st.sampled_from(["random", "equal", "zero"]),
)
def test_each_layer_has_the_papers_count_after_every_update(final, initial, coupling, weights):
    model = net()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            if weights != "random":
                layer.weight.fill_(0.1 if weights == "equal" else 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = GradualPruner(
            model,
            sgd(model),
            final,
            initial_sparsity=initial,
            coupling=coupling,
            allow_decrease=True,
            **WINDOW,
        )
    for step in range(18):
        train(model, pruner, 1, first=step)
        sparsity = 0.0 if step < 2 else pruner.schedule.value(min(step - (step - 2) % 3, 14))
        for mask in pruner.masks.values():
            kept = max(round(mask.numel() * (1 - sparsity)), 1)
            assert abs(int(mask.sum()) - kept) <= (
                abs(mask.numel() * (1 - sparsity) % 1 - 0.5) < 1e-6
            )


def test_masks_change_in_the_window_only():
    model = net()
    pruner = GradualPruner(model, sgd(model), 0.8, **WINDOW)
    changes, before = [], pruner.masks.clone()
    for step in range(30):
        train(model, pruner, 1, first=step)
        if pruner.masks != before:
            changes.append(step)
            before = pruner.masks.clone()
    # At step 2 the ramp is still at 0; from 14 on masks are fixed.
    assert changes == [5, 8, 11, 14]
    assert pruner.sparsity_at(0) == 0
    assert pruner.sparsity_at(14) == pruner.sparsity_at(99) == 0.8


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_masked_values_are_bitwise_unchanged_between_updates(optimizer):
    model = net()
    pruner = GradualPruner(model, optimizer(model), 0.8, **WINDOW)
    train(model, pruner, 15)
    before = {n: w.clone() for n, w in pruner.controller.stored_weights().items()}
    masks = pruner.masks.clone()
    train(model, pruner, 10, first=15)
    for name, weight in pruner.controller.stored_weights().items():
        assert torch.equal(weight[~masks[name]], before[name][~masks[name]])
        assert bool((weight[masks[name]] != before[name][masks[name]]).any())
        assert bool((before[name][~masks[name]] != 0).any())


def reentry_case(coupling):
    """Two weights; the first is masked while the second shrinks below it."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 1.0]]))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    pruner = GradualPruner(
        model,
        optimizer,
        0.5,
        initial_sparsity=0.5,
        begin_step=0,
        end_step=4,
        frequency=1,
        coupling=coupling,
    )
    seen = []
    for _ in range(5):
        pruner.zero_grad()
        (0.3 * model(torch.tensor([[0.0, 1.0]])).abs()).sum().backward()
        pruner.step()
        seen.append(pruner.masks["weight"].flatten().tolist())
    return seen


def test_an_entry_returns_when_survivors_shrink_below_it():
    seen = reentry_case("frozen")
    assert seen[0] == [False, True]
    assert seen[-1] == [True, False]
    assert reentry_case(Frozen(in_place=True)) == seen


def test_an_entry_never_returns_under_hard_coupling():
    assert reentry_case("hard") == [[False, True]] * 5
    model = net()
    pruner = GradualPruner(model, adamw(model), 0.8, coupling="hard", **WINDOW)
    before = pruner.masks.clone()
    for step in range(20):
        train(model, pruner, 1, first=step)
        assert not any(bool((m & ~before[n]).any()) for n, m in pruner.masks.items())
        before = pruner.masks.clone()


def test_pruned_entries_may_return_under_dense_gradients():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 1.0]]))
    pruner = GradualPruner(
        model,
        torch.optim.SGD(model.parameters(), 1.0),
        0.5,
        initial_sparsity=0.5,
        begin_step=0,
        end_step=4,
        frequency=2,
        coupling="hard_dense_grad",
    )
    for _ in range(3):
        pruner.zero_grad()
        (2.0 * model(torch.tensor([[1.0, 0.0]]))).sum().backward()
        pruner.step()
    assert pruner.masks["weight"].tolist() == [[True, False]]


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_block_masks_are_unions_of_the_best_tiles(pool):
    model = nn.Linear(10, 7)  # ragged on both sides
    pruner = GradualPruner(
        model,
        torch.optim.SGD(model.parameters(), 0.0),
        0.5,
        pattern="3x4",
        pool=pool,
        begin_step=0,
        end_step=2,
        frequency=1,
    )
    for _ in range(3):
        pruner.zero_grad()
        model(torch.randn(2, 10)).sum().backward()
        pruner.step()
    mask, weight = pruner.masks["weight"], pruner.controller.stored_weights()["weight"].abs()
    assert Block(3, 4).is_satisfied(mask)
    tiles = [
        (weight[i : i + 3, j : j + 4], mask[i : i + 3, j : j + 4])
        for i in range(0, 7, 3)
        for j in range(0, 10, 4)
    ]
    pooled = [float(w.mean() if pool == "avg" else w.max()) for w, _ in tiles]
    kept = [bool(m.all()) for _, m in tiles]
    assert sum(kept) == max(round(9 * 0.5), 1)
    assert min(p for p, k in zip(pooled, kept, strict=True) if k) >= max(
        p for p, k in zip(pooled, kept, strict=True) if not k
    )


def test_nm_masks_are_made_once_and_then_fixed():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    pruner = GradualPruner(model, sgd(model), 0.5, pattern="2:4", begin_step=3, end_step=9)
    history = []
    for _ in range(12):
        pruner.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        pruner.step()
        history.append(pruner.masks.clone())
    assert history[2].sparsity() == 0
    assert history[3].sparsity() == 0.5
    assert all(masks == history[3] for masks in history[3:])


def test_global_scope_shares_one_budget():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(10)
    pruner = GradualPruner(model, sgd(model), 0.6, scope="global", **WINDOW)
    train(model, pruner, 16)
    assert pruner.masks.nnz == round(160 * 0.4)
    assert pruner.masks.layer_density()["0.weight"] > 0.5


def test_smoothed_threshold_lags_the_schedule():
    sparsities = []
    for ema in (0.0, 0.9):
        model = net()
        pruner = GradualPruner(model, sgd(model), 0.8, threshold_ema=ema, **WINDOW)
        train(model, pruner, 16)
        sparsities.append(pruner.masks.sparsity())
    assert sparsities[0] == pytest.approx(0.8, abs=0.01)
    assert 0 < sparsities[1] < 0.6


@pytest.mark.parametrize("coupling", ["frozen", "hard", "hard_dense_grad"])
def test_finalize_leaves_the_logits_and_a_plain_model(coupling):
    model = net()
    keys = list(model.state_dict())
    pruner = GradualPruner(model, sgd(model), 0.8, coupling=coupling, **WINDOW)
    train(model, pruner, 20)
    x = batch(99)[0]
    logits = model(x)
    masks = pruner.finalize()
    assert torch.equal(model(x), logits)
    assert list(model.state_dict()) == keys
    assert type(model[0]) is nn.Linear
    assert MaskSet.from_weights(model) == masks
    assert masks.sparsity() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("coupling", ["frozen", "hard", "hard_dense_grad"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_resuming_in_mid_ramp_is_bit_identical(coupling, ema, tmp_path):
    def fresh(seed=0):
        model = net(seed)
        options = {"coupling": coupling, "threshold_ema": ema, **WINDOW}
        return model, GradualPruner(model, adamw(model), 0.8, **options)

    straight, whole = fresh()
    train(straight, whole, 20)
    first, pruner = fresh()
    train(first, pruner, 9)
    save_state(pruner.state_dict(), tmp_path / "pruner")
    saved = copy.deepcopy((first.state_dict(), pruner.optimizer.state_dict()))
    second, resumed = fresh(seed=5)
    second.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(load_state(tmp_path / "pruner"))
    train(second, resumed, 11, first=9)
    assert resumed.masks == whole.masks
    for name, value in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_biases_and_normalisation_are_never_pruned():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))
    pruner = GradualPruner(model, sgd(model), 0.9, **WINDOW)
    assert list(pruner.masks) == ["0.weight", "3.weight"]


def test_an_lstm_is_pruned_with_its_embedding_and_softmax():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Embedding(20, 8), nn.LSTM(8, 8, 2)
            self.head = nn.Linear(8, 20)

        def forward(self, x):
            return self.head(self.rnn(self.embed(x))[0])

    model = Language()
    pruner = GradualPruner(
        model, torch.optim.SGD(model.parameters(), 1.0), 0.8, include=("*",), **WINDOW
    )
    assert len(pruner.masks) == 6
    x = torch.randint(0, 20, (5, 3))
    for _ in range(16):
        pruner.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        pruner.step()
    logits = model(x)
    masks = pruner.finalize()
    assert masks.sparsity() == pytest.approx(0.8, abs=0.01)
    assert torch.equal(model(x), logits)


def test_plain_values_make_the_same_pruner():
    config = {"final_sparsity": 0.75, "pattern": "4x1", "exclude": ["2"], **WINDOW}
    results = []
    for make in (
        lambda m, o: GradualPruner.from_config(m, o, config),
        lambda m, o: GradualPruner(m, o, 0.75, pattern=Block(4, 1), exclude=("2",), **WINDOW),
    ):
        model = net()
        pruner = make(model, sgd(model))
        train(model, pruner, 16)
        results.append(pruner.masks.clone())
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"final_sparsity": 0.5, "frequancy": 3, **WINDOW}, r"frequancy.*frequency"),
        ({"final_sparsity": 0.5, "begin_step": 0}, "end_step"),
        ({"final_sparsity": 0.5, "model": 1, **WINDOW}, "model"),
    ],
)
def test_configurations_with_mistakes_say_which(config, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        GradualPruner.from_config(model, sgd(model), config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_sparsity": 1.0}, "final_sparsity"),
        ({"final_sparsity": -0.1}, "final_sparsity"),
        ({"initial_sparsity": 0.9}, "allow_decrease"),
        ({"initial_sparsity": 0.9, "allow_decrease": True, "coupling": "hard"}, "decrease"),
        ({"begin_step": 9, "end_step": 9}, "end_step"),
        ({"begin_step": -1}, "begin_step"),
        ({"frequency": 0}, "frequency"),
        ({"frequency": 13}, "shorter than one frequency"),
        ({"power": 0.0}, "power"),
        ({"coupling": "ste"}, "coupling"),
        ({"pattern": "3:7"}, r"2\.weight|0\.weight|final_sparsity"),
        ({"pattern": "1:2", "final_sparsity": 0.75}, "final_sparsity"),
        ({"pattern": "circle"}, "pattern"),
        ({"include": ("nothing",)}, "nothing"),
        ({"exclude": ("*",)}, "no parameter selected"),
    ],
)
def test_bad_input_is_refused(options, message):
    model = net()
    arguments = {"final_sparsity": 0.8, **WINDOW, **options}
    with pytest.raises(ValueError, match=message):
        GradualPruner(model, sgd(model), **arguments)


def test_blocks_on_convolutions_must_be_asked_for():
    model = nn.Conv2d(8, 8, 3)
    with pytest.raises(ValueError, match=r"weight.*flatten"):
        GradualPruner(model, sgd(model), 0.5, pattern="4x1", **WINDOW)
    GradualPruner(model, sgd(model), 0.5, pattern="block:4x1:flatten", **WINDOW)


def test_a_layer_that_would_vanish_keeps_one_weight_and_warns():
    model = nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 1))
    with pytest.warns(UserWarning, match=r"1\.weight.*keeps 1"):
        pruner = GradualPruner(model, sgd(model), 0.99, **WINDOW)
    for _ in range(16):
        pruner.zero_grad()
        model(torch.randn(3, 100)).sum().backward()
        pruner.step()
    assert int(pruner.masks["1.weight"].sum()) == 1


def test_rows_that_would_vanish_keep_one_weight_each_and_warn():
    model = nn.Linear(4, 8)
    with pytest.warns(UserWarning, match=r"each row of 'weight' has 4 units.*it keeps 1"):
        pruner = GradualPruner(model, sgd(model), 0.95, scope="row", **WINDOW)
    for _ in range(16):
        pruner.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        pruner.step()
    assert pruner.masks["weight"].sum(1).tolist() == [1] * 8


def test_a_pruner_that_never_stepped_says_so():
    model = net()
    pruner = GradualPruner(model, sgd(model), 0.8, **WINDOW)
    with pytest.raises(RuntimeError, match=r"nothing was pruned.*step"):
        pruner.finalize()


def test_finalizing_before_the_end_of_the_ramp_warns():
    model = net()
    pruner = GradualPruner(model, sgd(model), 0.8, **WINDOW)
    train(model, pruner, 7)
    with pytest.warns(UserWarning, match="before the ramp's end"):
        pruner.finalize()


def test_a_model_is_not_wrapped_twice():
    model = net()
    first = GradualPruner(model, sgd(model), 0.8, **WINDOW)
    with pytest.raises(ValueError, match="another mask controller"):
        GradualPruner(model, sgd(model), 0.8, **WINDOW)
    del first
    with pytest.raises(ValueError, match="already parametrized"):
        GradualPruner(model, sgd(model), 0.8, **WINDOW)


def test_nan_weights_name_the_layer():
    model = net()
    pruner = GradualPruner(model, sgd(model), 0.8, **WINDOW)
    train(model, pruner, 5)
    with torch.no_grad():
        model[2].parametrizations.weight.original[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weight.*nan"):
        train(model, pruner, 1, first=5)


class Run:
    """What `aerogel.train` shows its callbacks."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer


def test_the_training_callback_equals_stepping_and_resumes():
    config = {"final_sparsity": 0.8, **WINDOW}

    def run(model, callback, optimizer, steps, first=0):
        callback.on_train_begin(Run(model, optimizer))
        for step in range(first, first + steps):
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            callback.on_optimizer_step(Run(model, optimizer))

    stepped = net()
    pruner = GradualPruner(stepped, sgd(stepped), **config)
    train(stepped, pruner, 20)
    pruner.finalize()

    model = net()
    callback, optimizer = train_callback(**config), sgd(model)
    run(model, callback, optimizer, 9)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), callback.state_dict()))
    assert list(saved[0]) == list(net().state_dict())

    model = net(seed=7)
    model.load_state_dict(saved[0])
    callback, optimizer = train_callback(**config), sgd(model)
    optimizer.load_state_dict(saved[1])
    callback.load_state_dict(saved[2])
    run(model, callback, optimizer, 11, first=9)
    callback.on_epoch_end(None)
    callback.on_train_end(Run(model, optimizer))
    for a, b in zip(stepped.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_hugging_face_trainer_prunes_and_resumes(tmp_path):
    transformers = pytest.importorskip("transformers")
    x, y = torch.randn(64, 6), torch.randint(0, 4, (64,))
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def trainer(model, folder):
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=8,
            max_steps=20,
            save_steps=9,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            logging_strategy="no",
            seed=0,
            save_total_limit=4,
        )
        callback = trainer_callback(final_sparsity=0.8, **WINDOW)
        return transformers.Trainer(
            model=model, args=arguments, train_dataset=data, callbacks=[callback]
        )

    whole = Wrapped()
    trainer(whole, tmp_path / "a").train()
    assert MaskSet.from_weights(whole).sparsity() == pytest.approx(0.8, abs=0.01)
    checkpoint = tmp_path / "a" / "checkpoint-9"
    assert (checkpoint / "aerogel_pruner.safetensors").is_file()

    resumed = Wrapped()
    trainer(resumed, tmp_path / "a").train(resume_from_checkpoint=str(checkpoint))
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
