"""The arena: equal ground, every reason told, and nothing lost to a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from aerogel import compress
from aerogel.arena import Arena, Outcome, executors, markdown, page, run
from aerogel.arena.plan import pattern_for
from aerogel.arena.run import _train_dense
from aerogel.cli.app import app
from aerogel.pruning import METHODS, GradualPruner, SearchMethod

RECIPE = """
model: {name: digits_mlp, options: {hidden: [48, 32]}}
data: digits
sparsity: 0.5
schedule: {updates: 8}
dense: {epochs: 2, batch_size: 64, lr: 0.05, eval_samples: 100}
prune: {epochs: 2, batch_size: 64, lr: 0.05, eval_samples: 100}
measure: {rounds: 3}
"""
STOP = 30  # steps, within the second epoch
QUICK = ("gradual-pruning", "magnitude", "rigl", "bdwp")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("arena") / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def arena(recipe: str, **options: object) -> Arena:
    values = {"methods": QUICK, "sparsities": (0.5, 0.8), "seeds": (0,), "recipe": recipe}
    return Arena("digits_mlp", "digits", **{**values, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def outcome(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trials")
    return folder, run(arena(recipe), folder)


def test_every_method_starts_from_one_dense_network_under_one_budget(
    outcome: tuple[Path, Outcome],
) -> None:
    folder, found = outcome
    ran = [row for row in found.rows if not row.missing]
    assert {row.method for row in ran} == set(QUICK)
    assert len({row.dense_accuracy for row in ran}) == 1
    budgets: dict[bool, set[float]] = {True: set(), False: set()}
    for row in ran:
        assert row.zeros == pytest.approx(row.sparsity, abs=0.02)
        assert row.seconds is not None
        assert row.bytes is not None
        assert row.dense_bytes is not None
        assert row.bytes < row.dense_bytes
        name = f"{row.method}-{100 * row.sparsity:g}-seed0"
        kept = json.loads((folder / name / "results.json").read_text())
        assert kept["subject"]["method"] == row.method
        recipe = compress.load_recipe(folder / name / "recipe.yaml")
        budgets[METHODS[row.method].from_scratch].add(recipe.prune.epochs)
    assert budgets == {False: {2.0}, True: {4.0}}  # of two dense epochs and two of pruning


def test_a_method_that_cannot_reach_a_sparsity_says_so(outcome: tuple[Path, Outcome]) -> None:
    rows = {(row.method, row.sparsity): row for row in outcome[1].rows}
    assert rows["bdwp", 0.8].missing == "bdwp has no pattern of 80% zeros"
    assert rows["bdwp", 0.5].pattern == "2:4"
    assert pattern_for("progressive-gradient-flow", 0.875) == "1:8"
    assert pattern_for("wanda", 0.8) == "unstructured"
    assert pattern_for("sparsebytenn", 0.8) == "kernel-group:4"


def test_a_repeated_run_reads_what_is_there(
    outcome: tuple[Path, Outcome], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = outcome

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("aerogel.train.fit", refuse)
    assert run(arena(recipe), folder).rows == found.rows


def test_a_run_that_is_stopped_within_a_trial_goes_on_there(
    outcome: tuple[Path, Outcome], recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = arena(recipe, methods=("gradual-pruning",), sparsities=(0.5,))
    taken: list[int] = []
    step = GradualPruner.step

    def counted(self: GradualPruner, *args: object) -> object:
        taken.append(self.controller.t)
        if len(taken) == STOP:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(GradualPruner, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path)
    assert not (tmp_path / "arena.json").exists()
    told: list[str] = []
    (row,) = run(plan, tmp_path, on_trial=lambda *event: told.append(event[2])).rows
    assert 0 < taken[STOP] < STOP  # from the end of the first epoch, not from its beginning
    assert told == ["dense, seed 0", "gradual-pruning-50-seed0"]
    files = [f / "gradual-pruning-50-seed0" / "model.safetensors" for f in (outcome[0], tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert row.seconds is not None


def test_a_trial_that_fails_stops_no_other(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS["magnitude"]

    def broken(*_: object) -> None:
        raise ValueError("no luck today")

    monkeypatch.setitem(METHODS, "magnitude", type(method)(slug="magnitude", prune=broken))
    methods = ("magnitude", "gradual-pruning")
    rows = run(arena(recipe, methods=methods, sparsities=(0.5,)), tmp_path).rows
    assert rows[0].missing == "no luck today"
    assert rows[1].accuracy is not None


def test_processes_give_the_same_networks(
    outcome: tuple[Path, Outcome], recipe: str, tmp_path: Path
) -> None:
    methods = ("gradual-pruning", "magnitude")
    run(arena(recipe, methods=methods, sparsities=(0.5,)), tmp_path, workers=2)
    for method in methods:
        files = [f / f"{method}-50-seed0" / "model.safetensors" for f in (outcome[0], tmp_path)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_auto_means_ray_only_where_a_cluster_is_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert executors.choose("auto") == "processes"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    assert executors.choose("auto") == "processes"  # not installed
    with pytest.raises(ValueError, match=r"needs Ray: pip install 'aerogel\[ray\]'"):
        executors.choose("ray")
    monkeypatch.setattr(executors, "find_spec", lambda name: object())
    assert executors.choose("auto") == "ray"
    with pytest.raises(ValueError, match=r"executor must be one of .*got 'threads'"):
        executors.choose("threads")


def test_a_folder_that_a_machine_does_not_see_is_named(recipe: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "arena" / ".seen-by-all"
    with pytest.raises(ValueError, match="needs a folder that all machines see"):
        _train_dense(arena(recipe).dense_recipe(0), 0, elsewhere)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A real Ray, of two workers on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray = pytest.importorskip("ray")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        yield
        ray.shutdown()


@pytest.mark.usefixtures("cluster")
class TestThroughRay:
    def test_networks_are_the_same_and_a_stopped_run_goes_on(
        self, outcome: tuple[Path, Outcome], recipe: str, tmp_path: Path
    ) -> None:
        assert executors.choose("auto") == "ray"
        methods = ("gradual-pruning", "magnitude")
        plan = arena(recipe, methods=methods, sparsities=(0.5,))

        def stop(done: int, total: int, name: str) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path, executor="ray", on_trial=stop)
        told: list[str] = []
        rows = run(plan, tmp_path, executor="ray", on_trial=lambda *a: told.append(a[2])).rows
        assert [row.missing for row in rows] == ["", ""]
        assert set(told) == {"dense, seed 0", *(trial.name for trial in plan.trials())}
        assert not list(tmp_path.glob(".seen-by-all*"))
        for method in methods:
            files = [f / f"{method}-50-seed0" / "model.safetensors" for f in (outcome[0], tmp_path)]
            assert files[0].read_bytes() == files[1].read_bytes()
        assert run(plan, tmp_path, executor="processes").rows == rows

    def test_an_error_comes_back_as_it_was_raised(self, recipe: str, tmp_path: Path) -> None:
        each, end = executors.start("ray", workers=2)
        job = (arena(recipe).dense_recipe(0), 0, tmp_path / "elsewhere" / ".seen-by-all")
        with pytest.raises(ValueError, match=r"^folder .* is not the same one on"):
            list(each(_train_dense, [job]))
        end()


def test_table_and_page_show_what_ran_and_what_did_not(outcome: tuple[Path, Outcome]) -> None:
    table = markdown(outcome[1])
    assert table.count("| 50% |") == len(QUICK)
    assert "bdwp has no pattern of 80% zeros" in table
    assert table.count("**") == 4  # the best of each sparsity
    drawn = page(outcome[1])
    assert "gradual-pruning, 80% zeros" in drawn
    assert "digits_mlp on digits" in drawn


def test_all_means_every_method_of_one_training() -> None:
    chosen = Arena("digits_mlp", "digits").chosen()
    assert "wanda" in chosen
    assert not any(isinstance(METHODS[slug], SearchMethod) for slug in chosen)
    assert Arena("m", "d", methods=("Sparse_Model_Soups",)).chosen() == ("sparse-model-soups",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("wonda",)}, "'wonda' is unknown; nearest: wanda"),
        ({"sparsities": (1.0,)}, r"1.0 is not in \(0, 1\)"),
        ({"sparsities": ()}, "expected at least one"),
        ({"seeds": ()}, "expected at least one"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arena("digits_mlp", "digits", **options)


def test_the_command_writes_table_plot_and_figures(recipe: str, tmp_path: Path) -> None:
    arguments = ["arena", "--recipe", recipe, "--methods", "magnitude", "--sparsity", "0.5"]
    shown = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "magnitude" in (tmp_path / "arena.md").read_text()
    assert (tmp_path / "arena.html").stat().st_size > 1000
    (row,) = json.loads((tmp_path / "arena.json").read_text())
    assert row["accuracy"] > 0.5
    assert CliRunner().invoke(app, ["arena", "--executor", "threads"]).exit_code == 2
    bad = CliRunner().invoke(app, ["arena", "--sparsity", "half"])
    assert bad.exit_code == 2
    assert "sparsity = 'half'" in bad.output


def test_dense_networks_can_be_trained_alone(recipe: str, tmp_path: Path) -> None:
    file = compress.train_dense_network(compress.load_recipe(recipe), tmp_path / "dense")
    assert file.is_file()
