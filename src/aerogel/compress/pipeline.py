"""The stages of a compression run, each of which goes on where a kill left it.

    dense      load or train the dense network                    -> dense.safetensors
    prune      make it sparse while fine-tuning                   -> model.safetensors
    evaluate   both networks, read back from their files
    measure-*  compile, and time against the dense engines, one stage a batch and thread count
    report     results.json and report.html

Under `torchrun` every rank trains; rank 0 alone writes, prints and measures.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from aerogel import bench, data, report, runtime, train
from aerogel.atomic import write_atomic
from aerogel.compress import ranks
from aerogel.compress.console import Console, Silent
from aerogel.compress.loading import (
    MODEL_KEY,
    check_finite,
    example_inputs,
    load_data,
    load_model,
    source_of,
    starts_trained,
)
from aerogel.compress.measuring import Pair, measure, settings_of
from aerogel.compress.outcome import assemble, data_facts
from aerogel.compress.recipe import ModelSpec, Recipe, Rewrite
from aerogel.compress.training import chosen_by, sparse_parameters, train_dense, train_sparse
from aerogel.compress.workdir import Marker, RunFolder, key_of
from aerogel.pruning import METHODS, RewritingMethod
from aerogel.pruning.selection import pruned_parameters, unfit_parameters

DENSE_FILE, SPARSE_FILE = "dense.safetensors", "model.safetensors"
# Both networks, an optimizer's two moments and its parameters twice while a state is replaced.
DISK_FACTOR = 8


def run(
    recipe: Recipe,
    out_dir: str | Path,
    *,
    console: Console | None = None,
    restart: bool = False,
    command: str = "",
) -> report.Results | None:
    """Compress a network as a recipe says, or go on with a run that was stopped.

    Args:
        recipe: What to do.
        out_dir: Folder for the results; a stopped run is continued in its own.
        console: Where messages and progress go; None is silent.
        restart: Throw away what an earlier run left in `out_dir`.
        command: The command line, for the report.

    Returns:
        The results, as `out_dir/results.json` has them; None on ranks above 0.

    Raises:
        FolderError: The folder cannot be used, or belongs to another recipe.
        ValueError: Unknown model or data, weights that are not finite, an unfit pattern.
        OSError: Writing failed; the same command goes on once the cause is gone.
    """
    path = Path(out_dir)
    if not ranks.is_main():
        _Run(recipe, RunFolder(path), Silent()).train()
        ranks.leave()
        return None
    with RunFolder.opened(path, recipe, restart=restart) as folder:
        write_atomic(path / "recipe.yaml", _recipe_file(recipe))
        this = _Run(recipe, folder, console or Silent())
        dense, sparse = this.train()
        ranks.leave()
        return this.conclude(dense, sparse, command)


def train_dense_network(
    recipe: Recipe, out_dir: str | Path, *, console: Console | None = None
) -> Path:
    """Only the first stage of `run`: load or train the dense network, or go on with that.

    Args:
        recipe: Its model, data, dense training and seed count.
        out_dir: Folder for the network.
        console: Where progress goes; None is silent.

    Returns:
        The file of its weights.

    Raises:
        As `run`.
    """
    path = Path(out_dir)
    with RunFolder.opened(path, recipe, restart=False) as folder:
        _Run(recipe, folder, console or Silent()).train_dense()
    return path / DENSE_FILE


def _recipe_file(recipe: Recipe) -> str:
    head = "# All that decided this run; `aerogel compress --recipe THIS --out NEW` repeats it."
    return f"{head}\n{recipe.to_yaml()}"


class _Run:
    def __init__(self, recipe: Recipe, folder: RunFolder, console: Console) -> None:
        self.recipe, self.folder, self.console = recipe, folder, console
        self._dataset: data.Dataset | None = None
        self._data_notes: list[str] = []

    @property
    def dataset(self) -> data.Dataset:
        """Loaded when the first stage needs it."""
        if self._dataset is None:
            with (
                self.console.task(f"data {self.recipe.data.name}", "MB") as task,
                warnings.catch_warnings(record=True) as caught,
            ):
                warnings.simplefilter("always", UserWarning)
                self._dataset = load_data(
                    self.recipe.data, lambda _, done, total: task.update(done / 1e6, total / 1e6)
                )
            # A stand-in for the data asked for must be seen on the screen and in the report.
            self._data_notes = [str(w.message) for w in caught if w.category is UserWarning]
            for note in self._data_notes:
                self.console.warn(note)
        return self._dataset

    def _stage(
        self, name: str, key: str, files: Sequence[str], work: Callable[[], dict[str, Any]]
    ) -> Marker:
        """Do a stage on this process alone, unless it was finished before."""
        marker = self.folder.finished(name, key)
        if marker is not None:
            self.console.say(f"{name}: done before")
            return marker
        self.console.say(f"{name} ...")
        begin = time.monotonic()
        result = work()
        marker = self.folder.finish(name, key, files, result, time.monotonic() - begin)
        self.console.say(f"{name}: {marker.seconds:.1f} s")
        return marker

    def _shared_stage(
        self, name: str, key: str, file: str, work: Callable[[], dict[str, Any]]
    ) -> Marker:
        """Do a stage on every rank; rank 0 decides whether it is needed and records its end."""
        if ranks.world_size() == 1:
            return self._stage(name, key, [file], work)
        done = self.folder.finished(name, key) if ranks.is_main() else None
        done = ranks.from_main(done)
        if done is None and ranks.is_main():
            done = self._stage(name, key, [file], work)
        elif done is None:
            work()
        return ranks.from_main(done)  # type: ignore[return-value]

    def train_dense(self) -> Marker:
        """The first of the stages that all ranks share."""
        recipe = self.recipe.model_dump(mode="json")
        part = {name: recipe[name] for name in ("model", "data", "dense", "seed")}
        return self._shared_stage("dense", key_of("dense", part), DENSE_FILE, self._dense)

    def train(self) -> tuple[Marker, Marker]:
        """The stages all ranks share."""
        recipe = self.recipe.model_dump(mode="json")
        dense = self.train_dense()
        rest = {name: recipe[name] for name in recipe if name not in ("dense", "measure")}
        key = key_of("prune", rest, dense.key, dense.files)
        return dense, self._shared_stage("prune", key, SPARSE_FILE, self._prune)

    def _dense(self) -> dict[str, Any]:
        recipe = self.recipe
        model = load_model(recipe.model, self.dataset, seed=recipe.seed)
        names = self._pruned(model)  # fails now rather than after training
        size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        if ranks.is_main():
            self.folder.ensure_space(DISK_FACTOR * size)
        self.console.say(f"  {recipe.model.name}: {size / 4e6:.2f} M numbers, {len(names)} layers "
                         f"to prune, {len(self.dataset.train):,} examples")  # fmt: skip
        curves: list[dict[str, Any]] = []
        if not recipe.dense.skipped:
            with self.console.task("dense", "steps") as task:
                state = self.folder.training_state("dense")
                curves = train_dense(model, self.dataset, recipe, state, task)
            check_finite(model, "the dense network after training")
        elif not starts_trained(recipe.model):
            self.console.warn("the dense network is neither trained nor loaded from weights")
        self._save(model, DENSE_FILE)
        parameters = sum(p.numel() for p in model.parameters())
        facts = {"data": data_facts(self.dataset), "notes": self._data_notes}
        return {"curves": curves, "parameters": parameters, **facts}

    def _pruned(self, model: nn.Module) -> tuple[str, ...]:
        return pruned_parameters(model, *chosen_by(self.recipe, model))

    def _spec(self, name: str) -> ModelSpec:
        """How the network of one of the run's files is built."""
        spec = self.recipe.model.model_copy(update={"weights": None})
        if name == DENSE_FILE or not isinstance(METHODS[self.recipe.method], RewritingMethod):
            return spec
        names = list(self._pruned(load_model(spec, self.dataset, seed=self.recipe.seed)))
        rewrite = Rewrite(method=self.recipe.method, weights=names, sparsity=self.recipe.sparsity)
        return spec.model_copy(update={"rewrite": rewrite})

    def _prune(self) -> dict[str, Any]:
        model = self.load(DENSE_FILE)
        notes = []
        if unfit := unfit_parameters(model, *chosen_by(self.recipe, model)):
            notes.append(
                f"Pattern {self.recipe.pattern} does not fit {len(unfit)} weights, which stay "
                f"dense: {', '.join(unfit[:3])}{', ...' * (len(unfit) > 3)}."
            )
            self.console.warn(notes[-1])
        state = self.folder.training_state("prune")
        dense = self.load(DENSE_FILE)
        model, curves = train_sparse(
            model, dense, self.dataset, self.recipe, state, self.console, self._fresh
        )
        check_finite(model, "the sparse network after training")
        names = sparse_parameters(self.recipe, model)
        self._save(model, SPARSE_FILE, names)
        weights = {n: model.get_parameter(n) for n in names}
        kept = {n: [w.numel(), int(w.count_nonzero())] for n, w in weights.items()}
        return {"curves": curves, "pruned": kept, "notes": notes}

    def _save(self, model: nn.Module, name: str, pruned: Sequence[str] = ()) -> None:
        if not ranks.is_main():
            return
        runtime.save(
            model,
            self.folder.path / name,
            metadata={MODEL_KEY: self._spec(name).model_dump_json()},
            patterns=dict.fromkeys(pruned, self.recipe.pattern),
            format="dense" if name == DENSE_FILE else "auto",
        )

    def _fresh(self, seed: int) -> nn.Module:
        return load_model(self._spec(SPARSE_FILE), self.dataset, seed=seed)

    def load(self, name: str) -> nn.Module:
        """The network with the weights of one of the run's files, in evaluation mode."""
        model = load_model(self._spec(name), self.dataset, seed=self.recipe.seed)
        return runtime.load(self.folder.path / name, model).eval()

    def conclude(self, dense: Marker, sparse: Marker, command: str) -> report.Results:
        """What rank 0 does alone once both networks are on disk."""
        upstream = key_of(dense.key, dense.files, sparse.key, sparse.files)
        markers = {"dense": dense, "prune": sparse}
        key = key_of("evaluate", upstream)
        markers["evaluate"] = self._stage("evaluate", key, [], self._evaluate)
        with bench.Workers() as workers:
            for batch, threads in settings_of(self.recipe.measure):
                marker = self._measure(upstream, batch, threads, workers)
                markers[marker.stage] = marker
        facts = dense.result["data"]
        results = assemble(self.recipe, self.folder.path, facts, markers, command)
        content = results.to_dict()
        write_atomic(self.folder.path / "results.json", json.dumps(content, indent=1))
        write_atomic(self.folder.path / "report.html", report.render(content))
        return results

    def _evaluate(self) -> dict[str, Any]:
        scores = {}
        for label, name in (("dense", DENSE_FILE), ("sparse", SPARSE_FILE)):
            with self.console.task(f"evaluate {label}", "examples") as task:
                scores[label] = train.evaluate(
                    self.load(name), self.dataset, on_progress=task.update
                )
        return {"quality": scores}

    def _measure(self, upstream: str, batch: int, threads: int, workers: bench.Workers) -> Marker:
        settings = self.recipe.measure
        name = f"measure-batch{batch}-threads{threads}"
        key = key_of(name, upstream, settings.model_dump(mode="json"))

        def work() -> dict[str, Any]:
            seed = self.recipe.seed
            pair = Pair(
                self.load(DENSE_FILE),
                self.load(SPARSE_FILE),
                source_of(self._spec(DENSE_FILE), self.dataset, seed),
                source_of(self._spec(SPARSE_FILE), self.dataset, seed),
            )
            example = example_inputs(self.dataset, batch)
            label = f"batch {batch}, {threads} thread{'s' * (threads != 1)}"
            with self.console.task(label) as task, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # exporters' and engines' own; none is ours
                return measure(pair, example, threads, settings, task,
                               workers if settings.isolate else None)  # fmt: skip

        return self._stage(name, key, [], work)
