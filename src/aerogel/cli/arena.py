"""`aerogel arena`: pruning methods against each other on equal ground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from aerogel.cli import terminal


def arena(
    model: Annotated[
        str, typer.Option(help="Registered name, file or folder, or `import.path:callable`.")
    ] = "digits_mlp",
    data: Annotated[str, typer.Option(help="Registered name, or a folder of images.")] = "digits",
    methods: Annotated[str, typer.Option(help="Slugs with commas between, or all.")] = "all",
    sparsity: Annotated[
        str, typer.Option(help="Fractions of zeros with commas between.")
    ] = "0.5,0.8,0.9,0.95",
    seeds: Annotated[str, typer.Option(help="Repetitions, with commas between.")] = "0",
    recipe: Annotated[
        str | None, typer.Option(help="Recipe that the budget comes from; else the model's own.")
    ] = None,
    prune_epochs: Annotated[
        float | None, typer.Option(help="Length of every method's training.")
    ] = None,
    dense_epochs: Annotated[float | None, typer.Option(help="Length of dense training.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trials at a time, one thread each.")] = 1,
    executor: Annotated[
        Literal["auto", "processes", "ray"],
        typer.Option(help="auto takes Ray where RAY_ADDRESS names a cluster."),
    ] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/arena"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Train every method that fits under one budget, and compare accuracy, time and size.

    Writes `arena.md`, `arena.html` (the plot) and `arena.json`. A run that was stopped goes on when
    the command is repeated. A one-shot method trains on with its zeros fixed for the same number of
    steps; methods that train several networks run only where they are named.

    Examples:

    - `aerogel arena` : scikit-learn's digits, a few minutes
    - `aerogel arena --model mobilenet_v1_laptop --data fashion-mnist --sparsity 0.9 --workers 2`
    - `RAY_ADDRESS=auto aerogel arena --out /shared/arena` : on the machines of a Ray cluster
    """
    with terminal.guarded("The same command goes on from here."):
        from aerogel import arena as room
        from aerogel.atomic import write_atomic

        flags: dict[str, Any] = {"prune.epochs": prune_epochs, "dense.epochs": dense_epochs}
        plan = room.Arena(
            model=model,
            data=data,
            methods=tuple(terminal.listed([methods])),
            sparsities=tuple(_numbers("sparsity", sparsity, float)),
            seeds=tuple(_numbers("seeds", seeds, int)),
            flags={key: value for key, value in flags.items() if value is not None},
            recipe=recipe,
        )
        console = terminal.Terminal()
        with console.task("arena", "trials") as task:
            outcome = room.run(plan, out, workers=workers, executor=executor, on_trial=task.update)
        table = room.markdown(outcome)
        write_atomic(out / "arena.md", table)
        write_atomic(out / "arena.html", room.page(outcome))
        if as_json:
            typer.echo((out / "arena.json").read_text())
            return
        from rich.markdown import Markdown

        terminal.stdout().print(Markdown(table))
        console.say(f"plot: {out / 'arena.html'}")


def _numbers(flag: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in terminal.listed([text])]
    except ValueError:
        raise ValueError(f"{flag} = {text!r}: expected numbers with commas between") from None
