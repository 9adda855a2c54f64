"""The manifest cannot point at nothing: every row is walked to the things it names."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest

from aerogel import manifest

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = manifest.load_systems()


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.slug)
class TestEveryRow:
    def test_entry_imports_from_the_file_named_like_the_slug(self, system: manifest.System) -> None:
        entry = manifest.load_entry(system)
        assert Path(inspect.getfile(inspect.unwrap(entry))).stem == system.module_name

    def test_docstring_of_the_method_file_names_the_paper(self, system: manifest.System) -> None:
        entry = manifest.load_entry(system)
        assert system.paper in (sys.modules[entry.__module__].__doc__ or "")

    def test_experiment_exists_and_has_run(self, system: manifest.System) -> None:
        script = ROOT / system.experiment
        assert script.stem == system.module_name
        body = ast.parse(script.read_text()).body
        functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
        assert "run" in functions
        assert "seed" in [argument.arg for argument in functions["run"].args.args]

    def test_family_is_the_room_the_entry_lives_in(self, system: manifest.System) -> None:
        assert system.entry.split(".")[1] == system.family


def test_first_system_is_gradual_pruning() -> None:
    assert SYSTEMS[0].slug == "gradual-pruning"


def test_manifest_is_read_without_loading_torch() -> None:
    import subprocess

    code = "import sys, aerogel.manifest as m; m.load_systems(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_system_lists_the_nearest() -> None:
    with pytest.raises(ValueError, match="nearest: gradual-pruning"):
        manifest.find_system("gradul-prunning")


def test_underscores_and_dashes_name_the_same_system() -> None:
    assert manifest.find_system("gradual_pruning") is manifest.find_system("gradual-pruning")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[system]]\nslug = "a"\n', "system 1 \\(a\\): missing claim, entry"),
        (None, "unknown speed"),
        ("twice", "repeated slug"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    row = "[[system]]\n" + "".join(
        f"{name} = {value!r}\n".replace("'", '"') for name, value in SYSTEMS[0].to_dict().items()
    )
    content = {None: row + "speed = 3\n", "twice": row + row}.get(text, text)
    path = tmp_path / "systems.toml"
    path.write_text(str(content))
    with pytest.raises(ValueError, match=message):
        manifest.load_systems(path)


def test_readme_table_is_current() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README in this checkout")
    text = readme.read_text()
    assert manifest.replace_table(text, manifest.systems_table_markdown()) == text


def test_table_is_replaced_only_between_its_markers() -> None:
    text = f"before\n{manifest.TABLE_BEGIN}\nold\n{manifest.TABLE_END}\nafter\n"
    new = manifest.replace_table(text, "| new |")
    assert new == f"before\n{manifest.TABLE_BEGIN}\n| new |\n{manifest.TABLE_END}\nafter\n"
    with pytest.raises(ValueError, match="markers"):
        manifest.replace_table("no table here", "| new |")
