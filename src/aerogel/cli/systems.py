"""`aerogel systems`: the published systems this library implements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aerogel.cli import terminal

if TYPE_CHECKING:
    from aerogel.manifest import System


def systems(
    family: Annotated[str | None, typer.Option(help="Only systems of this family.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table that README and docs show.")
    ] = False,
    into: Annotated[
        Path | None, typer.Option(help="Renew the table between its markers in this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """List the published systems: paper, where to start, and the claim measured here.

    Example: `aerogel systems --family pruning`
    """
    from aerogel import manifest

    with terminal.guarded():
        known = manifest.families()
        if family is not None and family not in known:
            raise ValueError(f"family = {family!r} is unknown; there are {', '.join(known)}")
        rows = tuple(s for s in manifest.load_systems() if family in (None, s.family))
        if into is not None:
            _renew(into, manifest.systems_table_markdown(rows))
        if as_json:
            terminal.print_json([system.to_dict() for system in rows])
        elif markdown:
            typer.echo(manifest.systems_table_markdown(rows))
        else:
            _show(rows)


def _renew(path: Path, table: str) -> None:
    from aerogel.manifest import replace_table

    path.write_text(replace_table(path.read_text(encoding="utf-8"), table), encoding="utf-8")


def _show(rows: tuple[System, ...]) -> None:
    console = terminal.stdout()
    for system in rows:
        console.print(f"[bold]{system.slug}[/] [dim]({system.family})[/]  {system.entry}")
        console.print(f"  {system.title} ({system.year}), arXiv {system.paper}", highlight=False)
        console.print(f"  [cyan]claim[/] {system.claim}", highlight=False)
    count = f"{len(rows)} system{'s' * (len(rows) != 1)}"
    console.print(f"\n{count}; check a claim: [bold]aerogel reproduce SLUG[/]")
