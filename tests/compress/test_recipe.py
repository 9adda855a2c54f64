"""Recipes: every error points at its place, and an effective recipe repeats itself."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aerogel import bench, train
from aerogel.compress import RecipeError, builtin_recipes, load_recipe
from aerogel.compress.recipe import (
    ENGINE_ALIASES,
    ENGINES,
    SPARSE_ENGINES,
    Measurement,
    Recipe,
    Training,
)
from aerogel.compress.sources import parse_yaml


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("sparsity: 1.0\n", "1:11", "expected less than 1"),
        ("model: digits_mlp\nsparsity: -0.1", "2:11", "greater than or equal to 0"),
        ("seed: 3\nsparsity: 90%\n", "2:11", "valid number"),
        ("prune:\n  epoch: 3\n", "2:3", "unknown key 'prune.epoch'; nearest: epochs"),
        ("patern: 4x1\n", "1:1", "unknown key 'patern'; nearest: pattern"),
        ("dense: {lr: 0.1, batch_size: 0}\n", "1:30", "greater than or equal to 1"),
        ("method: gradul-pruning\n", "1:9", "nearest: gradual-pruning"),
        ("pattern: 4y1\n", "1:10", "4y1"),
        ("measure:\n  engines: [torch, openvno]\n", "2:12", "nearest: openvino"),
        ("base: dmo\n", "1:7", "nearest: demo"),
        ("prune: {epochs: 0}\n", "1:8", "needs training steps"),
        ("sparsity: 0.9\npattern: 2:4\n", "1:11", "contradicts pattern = '2:4', which means 0.5"),
        ("dense: {batch_size: 10, grad_accumulation: 3}", "1:8", "not a multiple"),
        ("schedule: {begin: 0.5, end: 0.2}", "1:11", "not after begin"),
        ("sparsity: .nan", "1:11", "finite number"),
    ],
)
def test_bad_value_is_shown_at_its_line_and_column(
    tmp_path: Path, text: str, place: str, message: str
) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    said = str(caught.value)
    assert f"{path}:{place}: " in said
    assert message in said
    line, column = (int(number) for number in place.split(":"))
    quoted, caret = said.split("\n")[1:3]
    assert quoted.endswith(text.splitlines()[line - 1])
    assert caret.index("^") == quoted.index("|") + 1 + column


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsity: [0.9\n", "not valid YAML"),
        ("a: 1\n  b: 2\n", "2:"),
        ("seed: 1\nseed: 2\n", "2:1: key 'seed' is given twice (first on line 1)"),
        ("- model\n", "1:1: expected `key: value` lines"),
        ("1: 2\n", "1:1: expected a plain name as key"),
        ("a: &a [*a]\n", "cannot contain itself"),
        ("a: !!python/object:os.system x\n", "1:4: not valid YAML"),
        ("? [a, b]\n: 1\n", "1:3: expected a plain name"),
        ("a: \x00\n", "not valid YAML"),
    ],
)
def test_broken_yaml_is_an_error_with_a_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_file(tmp_path, text))
    assert message in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = _file(tmp_path, "sparsity: 2\nseed: -1\nprun: {}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, {"method": "nothing"})
    said = str(caught.value)
    assert all(part in said for part in (":1:11:", ":2:7:", ":3:1:", "--method: "))


def test_unreadable_recipes_are_bad_input(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(RecipeError, match=r"recipe|yaml|file"):
            load_recipe(path)
    with pytest.raises(RecipeError, match="built in: demo, digits, minilm"):
        load_recipe("demmo")


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipe_is_valid(name: str) -> None:
    assert load_recipe(name).model.name


@pytest.mark.parametrize("name", builtin_recipes())
def test_effective_recipe_repeats_itself(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name, {"sparsity": 0.75, "seed": 7, "dense.epochs": 1e-5})
    assert load_recipe(_file(tmp_path, recipe.to_yaml())) == recipe


def test_flags_win_over_the_file_and_the_file_over_its_base(tmp_path: Path) -> None:
    path = _file(tmp_path, "base: digits\nsparsity: 0.7\nseed: 5\n")
    recipe = load_recipe(path, {"seed": 6, "pattern": None})
    digits = load_recipe("digits")
    assert (recipe.sparsity, recipe.seed, recipe.dense) == (0.7, 6, digits.dense)


def test_model_of_a_builtin_recipe_brings_its_settings() -> None:
    assert load_recipe(None, {"model.name": "minilm"}) == load_recipe("minilm")
    assert load_recipe() == load_recipe("demo")


def test_another_model_does_not_inherit_options(tmp_path: Path) -> None:
    path = _file(tmp_path, "base: digits\nmodel: {name: a, options: {hidden: [3]}}\n")
    assert load_recipe(path).model.options == {"hidden": [3]}
    assert load_recipe(path, {"model.name": "b"}).model.options == {}


def test_nm_pattern_brings_its_sparsity() -> None:
    assert load_recipe("digits", {"pattern": "2:4"}).sparsity == 0.5
    assert load_recipe("digits", {"pattern": "1:4", "sparsity": 0.75}).sparsity == 0.75
    with pytest.raises(RecipeError, match=r"--sparsity: sparsity = 0\.9 contradicts"):
        load_recipe("digits", {"pattern": "2:4", "sparsity": 0.9})


def test_training_fields_are_those_of_the_training_loop() -> None:
    from_recipe = {"distill_alpha", "temperature", "distill_features", "feature_weight", "seed"}
    known = {field.name for field in dataclasses.fields(train.TrainConfig)}
    assert set(Training.model_fields) == known - from_recipe
    defaults = train.TrainConfig()
    for name, value in Training().model_dump().items():
        assert getattr(defaults, name) == value, name


def test_engines_are_those_that_bench_knows() -> None:
    assert tuple(engine.name for engine in bench.DENSE_ENGINES) == ENGINES
    assert tuple(engine.name for engine in bench.SPARSE_ENGINES) == SPARSE_ENGINES
    aliases = {alias: e.name for e in bench.ENGINES for alias in getattr(e, "aliases", ())}
    assert aliases == ENGINE_ALIASES
    assert Measurement(engines=["torch", "compile", "torch"]).engines == [
        "torch eager", "torch.compile",
    ]  # fmt: skip


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*Recipe.model_fields, "base", "name", "options", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_yaml_gives_a_recipe_or_a_recipe_error(value: object) -> None:
    from aerogel.compress import resolve

    text = yaml.safe_dump(value)
    with contextlib.suppress(RecipeError):
        source = parse_yaml(text, "hostile.yaml")
        resolve._validated(Recipe, source.values, [source])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("no", "no"),
        ("2024-01-01", "2024-01-01"),
        ("1e-3", 1e-3),
        ("-7", -7),
        ("010", 10),
        (".5", 0.5),
        ("true", True),
        ("~", None),
        ("", None),
        ("4x1", "4x1"),
    ],
)
def test_plain_words_mean_what_they_look_like(text: str, value: object) -> None:
    assert parse_yaml(f"pattern: {text}", "recipe.yaml").values == {"pattern": value}
