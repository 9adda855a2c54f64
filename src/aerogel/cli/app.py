"""The commands together; each lives in a file of its own name."""

from __future__ import annotations

from typing import Annotated

import typer

import aerogel
from aerogel.cli import (
    arena,
    attention,
    bench,
    compress,
    export,
    info,
    report,
    reproduce,
    sat,
    systems,
)

app = typer.Typer(
    name="aerogel",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress")(compress.compress)
app.command("arena")(arena.arena)
app.command("bench")(bench.bench)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("systems")(systems.systems)
app.command("reproduce")(reproduce.reproduce)
app.command("sat")(sat.sat)
app.command("info")(info.info)
app.add_typer(attention.app, name="attention", help="Sparse attention in language models.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aerogel {aerogel.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Sparse deep learning: make zeros, keep zeros, and collect on them.

    **aerogel compress** makes a network sparse, keeps its accuracy and shows what was won.
    Without arguments it trains and prunes an image classifier in a few minutes.

    Exit codes: 0 done, 1 a claim did not hold, 2 bad input, 130 interrupted,
    143 terminated.
    """
