"""`aerogel bench`: how fast a network runs here, dense and sparse, on every engine installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aerogel.cli import terminal

if TYPE_CHECKING:
    from torch import nn

    from aerogel.report import Latency


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_DIR",
            help="Registered name, file, `import.path:callable`, or the folder of a run.",
        ),
    ],
    sparsity: Annotated[float, typer.Option(help="Zeros put at random into a MODEL.")] = 0.9,
    pattern: Annotated[str, typer.Option(help="Which of them go together.")] = "unstructured",
    batch: Annotated[list[int], typer.Option(min=1, help="May be repeated.")] = [1],  # noqa: B006
    threads: Annotated[
        list[int], typer.Option(min=0, help="May be repeated; 0 means all cores.")
    ] = [1],  # noqa: B006
    against: Annotated[
        list[str] | None,
        typer.Option(help="Only this engine; may be repeated.", show_default="all"),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="One input's shape, e.g. 3x224x224, if MODEL has no own.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds; medians count.")] = 15,
    seed: Annotated[int, typer.Option(help="Of weights, zeros and inputs.")] = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Show every layer's kernel.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Time a network on every engine installed, with the zeros it has or would have.

    A run's folder is timed as it is: its dense and its sparse network. Any other network gets
    random zeros of the given sparsity and pattern, which cost and save the same time as real ones.

    Examples:

    - `aerogel bench mobilenet_v1 --sparsity 0.9 --pattern 4x1`
    - `aerogel bench runs/mine --batch 1 --batch 32 --threads 0`
    """
    with terminal.guarded("Nothing was measured."):
        from aerogel import compress

        settings = compress.load_measurement(
            {"batch": batch, "threads": threads, "rounds": rounds, "against": against or None}
        )
        dense, sparse, example = _networks(model, sparsity, pattern, shape, seed)
        found = []
        with terminal.Terminal().task("bench") as task:
            for size, count in compress.settings_of(settings):
                inputs = example(size)
                found.append(compress.measure(dense, sparse, inputs, count, settings, task))
        _show(found, explain=explain, as_json=as_json)


def _networks(
    model: str, sparsity: float, pattern: str, shape: str | None, seed: int
) -> tuple[nn.Module, nn.Module, Any]:
    from aerogel import compress

    folder = Path(model)
    if (folder / "recipe.yaml").is_file():
        return compress.load_run(folder)
    sizes = None if shape is None else _sizes(shape)
    return compress.random_networks(model, sparsity, pattern, sizes, seed)


def _sizes(shape: str) -> tuple[int, ...]:
    parts = shape.lower().replace(",", "x").split("x")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"shape = {shape!r}: expected sizes joined by x, for example 3x224x224")
    return tuple(int(part) for part in parts)


def _show(found: list[dict[str, Any]], *, explain: bool, as_json: bool) -> None:
    from aerogel.cli import screen
    from aerogel.report import Latency

    if as_json:
        terminal.print_json(found)
        return
    console = terminal.stdout()
    latencies: list[Latency] = [Latency.model_validate(one["latency"]) for one in found]
    console.print(screen.latency_table(latencies))
    for text in [*screen.missing_engines(latencies), *screen.verdicts(latencies)]:
        console.print(text, highlight=False, soft_wrap=True)
    for one in found if explain else []:
        console.print(one["explanation"], highlight=False, markup=False, soft_wrap=True)
