"""From a recipe's name or file and the command line's flags to one validated recipe."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from aerogel.compress.recipe import Measurement, Recipe, nearest, pruning_methods
from aerogel.compress.sources import Location, RecipeError, Source, merge, parse_yaml, read_yaml

# What runs when nothing is asked for.
DEFAULT_BASE = "demo"
_SHORT_FORMS = ("model", "data")
Part = TypeVar("Part", bound=BaseModel)
_NM_PATTERN = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*(?::.*)?")


def builtin_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the library."""
    folder = resources.files("aerogel.compress") / "recipes"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def load_recipe(recipe: str | Path | None = None, flags: dict[str, Any] | None = None) -> Recipe:
    """Merge a recipe with its base and with command-line values, and validate it.

    A recipe's base is the built-in recipe it names under `base`; without that, the built-in one
    for the same model, or `demo` if no model is chosen at all.

    Args:
        recipe: Name of a built-in recipe, path of a YAML file, or None.
        flags: Values that win over the files, by dotted key: `{"sparsity": 0.8}`,
            `{"model.name": "minilm"}`. None values are ignored.

    Returns:
        The effective recipe.

    Raises:
        RecipeError: Unreadable, not YAML, unknown keys or values; every problem with its place.
    """
    flag_source = _flag_source(flags or {})
    user = [] if recipe is None else [_read(recipe)]
    sources = [*_base_of([*user, flag_source]), *user, flag_source]
    values = merge(sources)
    values.pop("base", None)
    _fit_sparsity_to_pattern(values, sources, _fit_pattern_to_method(values, sources))
    return _validated(Recipe, values, sources)


def load_measurement(flags: dict[str, Any]) -> Measurement:
    """Measurement settings from command-line values alone.

    Args:
        flags: By flag without dashes: `batch`, `threads`, `against`, `rounds`, `clock`. None is
            ignored.

    Raises:
        RecipeError: A value is out of range or unknown.
    """
    fields = {"batch": "batches", "threads": "threads", "against": "engines"}
    fields |= {"rounds": "rounds", "clock": "clock"}
    given = {fields[flag]: value for flag, value in flags.items() if value is not None}
    places: dict[Location, str] = {}
    for flag, field in fields.items():
        places[(field,)] = f"--{flag}"
        several = given.get(field)
        for index in range(len(several) if isinstance(several, list) else 0):
            places[(field, index)] = f"--{flag}"
    return _validated(Measurement, given, [Source("command line", given, flags=places)])


def _validated(kind: type[Part], values: dict[str, Any], sources: list[Source]) -> Part:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_explain(problem, sources) for problem in error.errors()]
        raise RecipeError("\n".join(problems)) from None


def _read(recipe: str | Path) -> Source:
    if str(recipe) in builtin_recipes():
        return _builtin(str(recipe))
    path = Path(recipe)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        names = builtin_recipes()
        raise RecipeError(
            f"recipe = {str(recipe)!r} is neither a file nor built in; built in: {', '.join(names)}"
        )
    return _long_forms(read_yaml(path))


def _builtin(name: str) -> Source:
    file = resources.files("aerogel.compress") / "recipes" / f"{name}.yaml"
    return _long_forms(parse_yaml(file.read_text(encoding="utf-8"), f"built-in recipe {name}"))


def _long_forms(source: Source) -> Source:
    """`model: NAME` says the same as `model: {name: NAME}`; likewise `data`."""
    values, marks = dict(source.values), dict(source.marks)
    for key in _SHORT_FORMS:
        if isinstance(values.get(key), str):
            values[key] = {"name": values[key]}
            if (key,) in marks:
                marks[(key, "name")] = marks[(key,)]
    return Source(source.name, values, marks, source.lines, source.flags)


def _flag_source(flags: dict[str, Any]) -> Source:
    values: dict[str, Any] = {}
    places: dict[Location, str] = {}
    for dotted, value in flags.items():
        if value is None:
            continue
        *parents, last = dotted.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
        shown = parents[-1] if last == "name" else last
        if parents and parents[-1] in ("dense", "prune"):
            shown = f"{parents[-1]}-{last}"
        places[(*parents, last)] = f"--{shown.replace('_', '-')}"
    return Source("command line", values, flags=places)


def _base_of(sources: list[Source]) -> list[Source]:
    """The built-in recipe under the given ones, or nothing."""
    for source in reversed(sources):
        name = source.values.get("base")
        if name is None:
            continue
        if name not in builtin_recipes():
            raise RecipeError(
                f"{source.place(('base',))}: base = {name!r} is not built in; "
                f"nearest: {nearest(str(name), builtin_recipes())}{source.quote(('base',))}"
            )
        return [_builtin(name)]
    model = merge(sources).get("model")
    if model is None:
        return [_builtin(DEFAULT_BASE)]
    wanted = model.get("name") if isinstance(model, dict) else None
    candidates = (_builtin(name) for name in builtin_recipes())
    return [base for base in candidates if base.values["model"]["name"] == wanted][:1]


def _fit_pattern_to_method(values: dict[str, Any], sources: list[Source]) -> int:
    """A method with a pattern of its own takes it, unless one is chosen along with the method.

    Returns:
        The number of the source that decides the pattern, by itself or by its method.
    """
    from aerogel.pruning.method import method_slug

    method = pruning_methods().get(method_slug(str(values.get("method"))))
    named = [i for i, source in enumerate(sources) if "pattern" in source.values]
    last = named[-1] if named else 0
    if method is None or method.pattern is None:
        return last
    chosen = next(i for i in reversed(range(len(sources))) if "method" in sources[i].values)
    if last >= chosen and named:
        return last
    values["pattern"] = method.pattern
    return chosen


def _fit_sparsity_to_pattern(values: dict[str, Any], sources: list[Source], below: int) -> None:
    """N:M fixes the sparsity; one chosen for another pattern gives way, a contradiction is told."""
    match = _NM_PATTERN.fullmatch(str(values.get("pattern", "")))
    if not match:
        return
    kept, group = int(match[1]), int(match[2])
    if not 0 < kept < group:
        return  # left to the pattern's own check
    implied = 1 - kept / group
    stated = [s for s in sources[below:] if "sparsity" in s.values]
    if not stated:
        values["sparsity"] = implied
    elif values["sparsity"] != implied:
        place = stated[-1].place(("sparsity",))
        raise RecipeError(
            f"{place}: sparsity = {values['sparsity']} contradicts pattern = "
            f"{values['pattern']!r}, which means {implied:g}; leave sparsity out"
            f"{stated[-1].quote(('sparsity',))}"
        )


def _explain(problem: Any, sources: list[Source]) -> str:
    location: Location = tuple(problem["loc"])
    is_key = problem["type"] == "extra_forbidden"
    dotted = ".".join(str(part) for part in location)
    if is_key:
        known = _keys_at(location[:-1])
        message = f"unknown key {dotted!r}; nearest: {nearest(str(location[-1]), known)}"
    elif problem["type"] == "missing":
        message = f"{dotted} is missing"
    else:
        reason = problem["msg"].removeprefix("Value error, ")
        reason = reason.replace("Input should be", "expected")
        message = f"{dotted} = {problem['input']!r}: {reason}" if dotted else reason
        if dotted.endswith("sparsity"):
            message += " (a fraction of zeros in [0, 1): 0.9 is 90 %)"
    for source in reversed(sources):
        if place := source.place(location, key=is_key):
            return f"{place}: {message}{source.quote(location, key=is_key)}"
    return message


def _keys_at(location: Location) -> list[str]:
    """The keys a recipe knows at `location`."""
    part: type[BaseModel] = Recipe
    for step in location:
        annotation = part.model_fields[str(step)].annotation
        options = [annotation, *get_args(annotation)]
        part = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    extra = ["base"] if part is Recipe else []
    return [*part.model_fields, *extra]
