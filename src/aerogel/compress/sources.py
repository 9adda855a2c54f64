"""Where recipe values come from: YAML text with the line and column of every value, and flags.

A recipe is merged from several sources (a built-in recipe, the user's file, command-line flags).
Each keeps the place of every value, so that an error found after merging still points at the
character that caused it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Location = tuple[str | int, ...]

# Ends the path under which the place of a key, not of its value, is kept.
KEY = "\0key"
# A recipe is a page of text; a larger file was named by mistake.
MAX_BYTES = 1 << 20


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the place and what was expected there."""


@dataclass(frozen=True)
class Source:
    """Recipe values from one place.

    Args:
        name: What to call the place in messages: a file's path or "command line".
        values: The values, nested as in the recipe.
        marks: 1-based (line, column) of each value by its path; of each key under `(*path, KEY)`.
        lines: The file's text by line, to quote it.
        flags: For the command line: the flag that gave each value.
    """

    name: str
    values: dict[str, Any]
    marks: dict[Location, tuple[int, int]] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    flags: dict[Location, str] = field(default_factory=dict)

    def place(self, location: Location, *, key: bool = False) -> str | None:
        """Where this source gives the value (or its key) at `location`, or None if it does not."""
        if location in self.flags:
            return self.flags[location]
        mark = self.marks.get((*location, KEY) if key else location)
        return None if mark is None else f"{self.name}:{mark[0]}:{mark[1]}"

    def quote(self, location: Location, *, key: bool = False) -> str:
        """The line that holds `location` with a caret under it, or an empty string."""
        mark = self.marks.get((*location, KEY) if key else location)
        if mark is None or not self.lines:
            return ""
        line, column = mark
        number = f"{line:5d}"
        text = self.lines[line - 1] if line <= len(self.lines) else ""
        return f"\n{number} | {text}\n{' ' * len(number)} | {' ' * (column - 1)}^"


class _Loader(yaml.SafeLoader):
    """YAML's core types only: in YAML 1.1 `2:4` is the number 124, and `no` is false."""


_SCALARS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        list("-+.0123456789"),
    ),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), _first)


def _mark(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


class _Walk:
    """Records the place of every node; refuses repeated and non-text keys, which YAML allows."""

    def __init__(self, name: str, lines: tuple[str, ...]) -> None:
        self.name, self.lines = name, lines
        self.marks: dict[Location, tuple[int, int]] = {}
        self._open: set[int] = set()

    def visit(self, node: yaml.Node, path: Location) -> None:
        if id(node) in self._open or len(path) > 16:
            self.fail(node, "a recipe cannot contain itself")
        self.marks[path] = _mark(node)
        self._open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.visit(item, (*path, index))
        self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: Location) -> None:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str) or key_node.tag != "tag:yaml.org,2002:str":
                self.fail(key_node, f"expected a plain name as key, got {key!r}")
            if key in seen:
                self.fail(key_node, f"key {key!r} is given twice (first on line {seen[key]})")
            seen[key] = key_node.start_mark.line + 1
            self.marks[(*path, key, KEY)] = _mark(key_node)
            self.visit(value_node, (*path, key))

    def fail(self, node: yaml.Node, message: str) -> None:
        location: Location = ("here",)
        source = Source(self.name, {}, {location: _mark(node)}, self.lines)
        raise RecipeError(f"{source.place(location)}: {message}{source.quote(location)}")


def parse_yaml(text: str, name: str) -> Source:
    """Parse recipe text, keeping the place of every key and value.

    Args:
        text: YAML; its top level is a mapping (or nothing).
        name: What to call it in messages.

    Raises:
        RecipeError: Not YAML, not a mapping, a repeated key, or a value that contains itself.
    """
    lines = tuple(text.splitlines())
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Source(name, {}, lines=lines)
            walk = _Walk(name, lines)
            if not isinstance(node, yaml.MappingNode):
                walk.fail(node, "expected `key: value` lines at the top of a recipe")
            walk.visit(node, ())
            values = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where: dict[Location, tuple[int, int]] = {}
        if mark:
            where[()] = (mark.line + 1, mark.column + 1)
        source = Source(name, {}, where, lines)
        raise RecipeError(
            f"{source.place(()) or name}: not valid YAML: {error.problem}{source.quote(())}"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{name}: not valid YAML: {error}") from None
    return Source(name, values, walk.marks, lines)


def read_yaml(path: Path) -> Source:
    """Read a recipe file; see `parse_yaml`.

    Raises:
        RecipeError: The file cannot be read or parsed.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: larger than {MAX_BYTES} bytes, so not a recipe")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"recipe {path}: {error.strerror or error}") from None
    return parse_yaml(text, str(path))


def merge(sources: list[Source]) -> dict[str, Any]:
    """Merge values, later sources winning; mappings merge key by key, everything else whole.

    `model` and `data` given anew replace the earlier ones whole when the name differs: options
    chosen for one network mean nothing to another. `options` are replaced whole for that reason
    too.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        merged = _merge_mapping(merged, source.values)
    return merged


def _merge_mapping(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    result = dict(low)
    for key, value in high.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and key != "options":
            renamed = "name" in value and value["name"] != old.get("name")
            result[key] = value if renamed else _merge_mapping(old, value)
        else:
            result[key] = value
    return result
