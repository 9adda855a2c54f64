"""The manifest of published systems: reads `systems.toml`, which is packaged beside this file.

A leaf: it imports no room of the library, so that `aerogel systems` answers without loading torch.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MANIFEST = Path(__file__).with_name("systems.toml")
TABLE_BEGIN = "<!-- systems table: begin (by `aerogel systems --into README.md`) -->"
TABLE_END = "<!-- systems table: end -->"


@dataclass(frozen=True)
class System:
    """One published system: a row of `systems.toml`, whose head explains each column."""

    slug: str
    title: str
    paper: str
    year: int
    family: str
    entry: str
    experiment: str
    claim: str

    @property
    def module_name(self) -> str:
        """The slug as Python spells it: `gradual-pruning` -> `gradual_pruning`."""
        return self.slug.replace("-", "_")

    @property
    def paper_url(self) -> str:
        """Address of the paper's abstract."""
        return f"https://arxiv.org/abs/{self.paper}"

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data, for JSON."""
        return asdict(self)


def _parse(row: dict[str, Any], position: int) -> System:
    expected = {field.name: str if field.name != "year" else int for field in fields(System)}
    where = f"{MANIFEST.name}, system {position} ({row.get('slug', 'no slug')})"
    if missing := sorted(expected.keys() - row.keys()):
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    if unknown := sorted(row.keys() - expected.keys()):
        raise ValueError(
            f"{where}: unknown {', '.join(unknown)}; columns are {', '.join(expected)}"
        )
    for name, kind in expected.items():
        if not isinstance(row[name], kind) or not row[name]:
            raise ValueError(f"{where}: {name} = {row[name]!r}, expected a {kind.__name__}")
    return System(**row)


@lru_cache(maxsize=8)
def load_systems(path: Path = MANIFEST) -> tuple[System, ...]:
    """Every system of the manifest, in its order.

    Args:
        path: The manifest; the packaged one by default.

    Raises:
        ValueError: A row lacks a column, has an unknown one, or repeats a slug.
    """
    with path.open("rb") as file:
        rows = tomllib.load(file).get("system", [])
    systems = tuple(_parse(row, position) for position, row in enumerate(rows, start=1))
    slugs = [system.slug for system in systems]
    if repeated := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
        raise ValueError(f"{path.name}: repeated slug {', '.join(repeated)}")
    return systems


def find_system(slug: str) -> System:
    """The system called `slug` (underscores and dashes are the same).

    Raises:
        ValueError: No such system; the nearest names are listed.
    """
    systems = {system.slug: system for system in load_systems()}
    wanted = slug.strip().lower().replace("_", "-")
    if wanted not in systems:
        near = difflib.get_close_matches(wanted, systems, n=5, cutoff=0.4) or sorted(systems)[:5]
        raise ValueError(f"system = {slug!r} is not in the manifest; nearest: {', '.join(near)}")
    return systems[wanted]


def families() -> tuple[str, ...]:
    """The families that have at least one system, in the manifest's order."""
    return tuple(dict.fromkeys(system.family for system in load_systems()))


def load_entry(system: System) -> Any:
    """Import the class or function a system's `entry` names.

    Raises:
        ImportError: The entry does not exist.
    """
    module_name, _, attribute = system.entry.rpartition(".")
    module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise ImportError(f"{system.slug}: {module_name} has no {attribute}")
    return getattr(module, attribute)


def systems_table_markdown(systems: tuple[System, ...] | None = None) -> str:
    """The systems as a Markdown table, as README and docs show it between their markers.

    Args:
        systems: The rows; the whole manifest by default.

    Returns:
        The table without a final newline.
    """
    rows = load_systems() if systems is None else systems
    lines = [
        "| system | paper | family | start here | measured claim |",
        "| --- | --- | --- | --- | --- |",
    ]
    for system in rows:
        paper = f"[{system.title}]({system.paper_url}) ({system.year})"
        script = f"[`{system.slug}`]({system.experiment})"
        lines.append(
            f"| {script} | {paper} | {system.family} | `{system.entry}` | {system.claim} |"
        )
    return "\n".join(lines)


def replace_table(text: str, table: str) -> str:
    """`text` with what stands between the table's markers replaced by `table`.

    Raises:
        ValueError: The markers are missing or in the wrong order.
    """
    begin, end = text.find(TABLE_BEGIN), text.find(TABLE_END)
    if begin < 0 or end < begin:
        raise ValueError(f"text lacks the markers {TABLE_BEGIN!r} ... {TABLE_END!r}")
    return text[: begin + len(TABLE_BEGIN)] + f"\n{table}\n" + text[end:]
