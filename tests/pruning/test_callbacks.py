"""Every training method gives the same bits under a plain loop and under each real trainer."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aerogel import train
from aerogel.data import Dataset, ImageSplit
from aerogel.pruning import METHODS, TrainingMethod
from aerogel.pruning.callbacks import (
    STATE_FILE,
    Attached,
    PrunerCallback,
    make_lightning_callback,
    make_trainer_callback,
    pruner_factory,
)
from aerogel.sparsity import MaskSet
from aerogel.sparsity.plain_state import restore_weights
from every_method import BATCH, HALF, STEPS, Net, batches, factory, network, samples, sgd, step_by

TRAINED = [slug for slug, method in METHODS.items() if isinstance(method, TrainingMethod)]
# Those that save weights by other means than zeros.
DENSE = ("a-priori-compression",)
# Methods that must see the network's own forward pass, not that of what wraps it.
NETWORK = {"gpusq-vit": "net"}
EVERY = pytest.mark.parametrize("method", TRAINED)


def plain(method: str) -> dict[str, Tensor]:
    """A loop of one's own."""
    model = network(method)
    optimizer = sgd(model)
    pruner = factory(method)(model, optimizer)
    step_by(model, optimizer, pruner.step)
    pruner.finalize()
    return model.state_dict()


EXPECTED: dict[str, dict[str, Tensor]] = {}


def check(method: str, found: nn.Module) -> None:
    if method not in EXPECTED:
        EXPECTED[method] = plain(method)
    state = found.state_dict()
    assert list(state) == list(EXPECTED[method])
    if method not in DENSE:
        zeros = (1 - float(m.float().mean()) for m in MaskSet.from_weights(found).values())
        assert max(zeros) > 0.4
    for name, value in EXPECTED[method].items():
        assert torch.equal(value, state[name]), name


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trainers on their settings; methods on tiny layers
        yield


class Run:
    """What `aerogel.train` shows its callbacks."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer


@EVERY
def test_under_a_loop_that_steps_the_optimizer(method: str) -> None:
    model = network(method)
    optimizer, callback = sgd(model), PrunerCallback(factory(method))
    callback.on_train_begin(Run(model, optimizer))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # wraps the step again
    step_by(model, optimizer, lambda: (optimizer.step(), schedule.step()))
    callback.on_train_end(Run(model, optimizer))
    check(method, model)


@EVERY
def test_under_accelerate(method: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = network(method)
    prepared, optimizer = accelerator.prepare(model, sgd(model))
    pruner = factory(method)(model, optimizer)
    step_by(prepared, optimizer, pruner.step)
    pruner.finalize()
    check(method, model)


class Killed(train.Callback):
    def on_optimizer_step(self, run: train.Run) -> None:
        if run.step == HALF + 2:
            raise KeyboardInterrupt


class Pass(train.Callback):
    """Stands where `Killed` stood."""


Pass.__name__ = Killed.__name__


@EVERY
def test_under_our_loop_and_on_going_on_after_a_kill(method: str, tmp_path: Path) -> None:
    x, y = samples()
    images = (20 * x + 128).clamp(0, 255).byte()
    split = ImageSplit(images, y, (0.5,), (0.1,), 4)
    names = tuple("abcd")
    data = Dataset("toy", "classification", split, split, 4, names, (1, 8, 8), "made up", "none")
    config = train.TrainConfig(steps=STEPS, batch_size=BATCH, lr=0.05, eval_samples=0)
    expected = network(method)
    pruners: list[Any] = []

    def wrap(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        pruners.append(factory(method)(model, optimizer))
        return pruners[-1]

    train.fit(expected, data, config, optimizer_wrapper=wrap)
    pruners[0].finalize()
    for last in (Killed(), Pass()):
        model = network(method)
        callbacks = [PrunerCallback(factory(method)), last]
        with contextlib.suppress(KeyboardInterrupt):
            train.fit(model, data, config, callbacks=callbacks, resume_dir=tmp_path)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def hugging_face(method: str, folder: Path, until: int = STEPS) -> tuple[Any, nn.Module]:
    transformers = pytest.importorskip("transformers")

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= until

    data = [{"x": x, "labels": y} for x, y in zip(*samples(), strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        save_steps=HALF,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    model = network(method)
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=data,
        callbacks=[make_trainer_callback(factory(method)), Stop()],
        optimizers=(sgd(model), None),
    )
    return trainer, model


@EVERY
def test_under_the_trainer_of_transformers_and_on_resuming(method: str, tmp_path: Path) -> None:
    trainer, model = hugging_face(method, tmp_path)
    trainer.train()
    check(method, model)
    checkpoint = tmp_path / f"checkpoint-{HALF}"
    assert (checkpoint / STATE_FILE).is_file()
    trainer, model = hugging_face(method, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # all of it comes from the checkpoint
    trainer.train(resume_from_checkpoint=str(checkpoint))
    check(method, model)


def lightning_fit(method: str, folder: Path, resume: str | None = None) -> nn.Module:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network(method)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return self.net(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    module = Module()
    data = torch.utils.data.TensorDataset(*samples())
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=HALF, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[make_lightning_callback(factory(method), NETWORK.get(method, "")), saving],
    )
    loader = torch.utils.data.DataLoader(data, BATCH)
    trainer.fit(module, loader, ckpt_path=resume)
    return module.net


@EVERY
def test_under_lightning_and_on_resuming(method: str, tmp_path: Path) -> None:
    check(method, lightning_fit(method, tmp_path))
    checkpoint = tmp_path / f"step={HALF}.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert set(state) == {f"net.{name}" for name in network(method).state_dict()}
    check(method, lightning_fit(method, tmp_path, str(checkpoint)))


def test_an_error_in_the_step_leaves_the_optimizer_usable_and_finalize_gives_it_back() -> None:
    model = Net()
    optimizer = sgd(model)
    original = optimizer.step
    attached = Attached(factory("rigl"), model, optimizer)
    model.point.weight.grad = torch.full_like(model.point.weight, torch.nan)
    step = attached.pruner.step

    def broken() -> None:
        raise ValueError("bad luck")

    attached.pruner.step = broken  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="bad luck"):
        optimizer.step()
    attached.pruner.step = step  # type: ignore[method-assign]
    model(*next(iter(batches())))["loss"].backward()
    optimizer.step()
    assert attached.pruner.state_dict()["t"] == 1
    attached.finalize()
    assert optimizer.step == original


@pytest.mark.parametrize("method", ["bdwp", "progressive-gradient-flow", "gradual-pruning"])
def test_a_checkpoint_of_a_network_under_masks_is_what_it_computes_with(method: str) -> None:
    model = Net()
    attached = Attached(factory(method), model, sgd(model))
    step_by(model, attached.optimizer, attached.optimizer.step)
    state = copy.deepcopy(model.state_dict())
    other = Net()
    other.load_state_dict(state)
    x = samples()[0]
    torch.testing.assert_close(other(x), model(x))
    weights = attached.state_dict()["weights"]
    assert any(bool((state[name] != value).any()) for name, value in weights.items())
    with pytest.raises(ValueError, match=r"weights: expected those of \["):
        restore_weights(model, {})
    first, *rest = weights
    wrong = {first: weights[first][:1], **{name: weights[name] for name in rest}}
    with pytest.raises(ValueError, match="has shape"):
        restore_weights(model, wrong)


def test_wrappers_keep_plain_names_behind_their_prefix() -> None:
    model = Net()
    Attached(factory("bdwp"), model, sgd(model))
    wrapped = nn.Sequential(model)
    assert next(iter(wrapped.state_dict())).startswith("0.")
    assert set(wrapped.state_dict()) == {f"0.{name}" for name in Net().state_dict()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wanda", 0.5, 10), "training method"),
        (("rigel", 0.5, 10), "nearest: rigl|rigl"),
        (("rigl", 0.5, 10, "2:4"), "pattern = '2:4': rigl prunes by unstructured"),
    ],
)
def test_bad_arguments_of_a_factory_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruner_factory(*arguments[:3], pattern=(*arguments, None)[3])


def test_a_factory_says_which_network_a_method_is_not_for() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'fast-sparse-convnets' cannot prune this network"):
        pruner_factory("fast_sparse_convnets", 0.5, 10)(model, sgd(model))


def test_the_trainer_may_not_go_back_to_the_best_weights(tmp_path: Path) -> None:
    trainer, _ = hugging_face("rigl", tmp_path)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="load_best_model_at_end = True: expected False"):
        trainer.train()


def test_resuming_without_the_pruners_file_is_an_error(tmp_path: Path) -> None:
    trainer, _ = hugging_face("rigl", tmp_path, until=HALF)
    trainer.train()
    (tmp_path / f"checkpoint-{HALF}" / STATE_FILE).unlink()
    trainer, _ = hugging_face("rigl", tmp_path)
    with pytest.raises(ValueError, match="cannot resume pruning"):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}"))
