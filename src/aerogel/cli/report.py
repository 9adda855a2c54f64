"""`aerogel report`: draw a run's page again from its `results.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aerogel.cli import terminal


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Draw `DIR/report.html` again from `DIR/results.json`, and show the final screen.

    Example: `aerogel report runs/mobilenet`
    """
    with terminal.guarded():
        from aerogel.atomic import write_atomic
        from aerogel.cli import screen
        from aerogel.report import Results, render

        path = folder / "results.json"
        if not path.is_file():
            raise ValueError(f"{folder}: no results.json; give the folder of an `aerogel` run")
        results = Results.from_file(path)
        write_atomic(folder / "report.html", render(results.to_dict()))
        if as_json:
            terminal.print_json(results.to_dict())
        else:
            screen.show(results, folder, terminal.stdout())
