"""`aerogel bench`: how fast a network runs here, dense and sparse, on every engine installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from aerogel.cli import terminal

if TYPE_CHECKING:
    from aerogel.compress import Measurement, Pair

# All that `--against` can name, in the order of the table.
ALL = ("torch", "channels_last", "compile", "onnxruntime", "openvino", "deepsparse")
_ONE = ["1"]


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
    batch: Annotated[list[str], typer.Option(help="One or several: 1,16.")] = _ONE,
    threads: Annotated[
        list[str], typer.Option(help="One or several: 1,2; 0 means all cores.")
    ] = _ONE,
    against: Annotated[
        list[str] | None,
        typer.Option(help=f"Only these engines, of {','.join(ALL)}.", show_default="all"),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="One input's shape, e.g. 3x224x224, if MODEL has no own.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds; medians count.")] = 15,
    clock: Annotated[
        Literal["wall", "cpu"],
        typer.Option(help="cpu: only the time an engine had its core, for a busy machine."),
    ] = "wall",
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which a silent engine is given up.")
    ] = 900.0,
    seed: Annotated[int, typer.Option(help="Of weights, zeros and inputs.")] = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Show every layer's kernel.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Draw a page with plots and machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Time a network on every engine installed, with the zeros it has or would have.

    Each engine has a process of its own; they take turns, round by round, and only one works at a
    time. Engines that are not installed are named, with what would install them.

    A run's folder is timed as it is: its dense and its sparse network. Any other network gets
    random zeros of the given sparsity and pattern, which cost and save the same time as real ones.

    Examples:

    - `aerogel bench mobilenet_v1 --sparsity 0.9 --pattern 4x1 --against torch,onnxruntime`
    - `aerogel bench runs/mine --batch 1,32 --threads 1,0 --plot bench.html`
    """
    with terminal.guarded("Nothing was measured; the engines' processes have ended."):
        from aerogel import compress

        settings = compress.load_measurement({
            "batch": _numbers("batch", batch),
            "threads": _numbers("threads", threads),
            "against": terminal.listed(against or ALL),
            "rounds": rounds,
            "clock": clock,
        })  # fmt: skip
        if plot is not None and not plot.parent.is_dir():
            raise ValueError(f"plot = {str(plot)!r}: there is no folder {str(plot.parent)!r}")
        pair, example = _networks(model, sparsity, pattern, shape, seed)
        found = _measure(pair, example, settings, timeout)
        _show(found, explain=explain, as_json=as_json)
        if plot is not None:
            _draw(found, plot, f"{model}, {sparsity:.0%} zeros ({pattern})")


def _numbers(flag: str, values: list[str]) -> list[int]:
    parts = terminal.listed(values)
    if not parts or not all(part.isdigit() for part in parts):
        raise ValueError(
            f"--{flag}: {flag} = {','.join(values)!r}: expected whole numbers joined by commas"
        )
    return [int(part) for part in parts]


def _networks(
    model: str, sparsity: float, pattern: str, shape: str | None, seed: int
) -> tuple[Pair, Any]:
    from aerogel import compress

    folder = Path(model)
    if (folder / "recipe.yaml").is_file():
        return compress.load_run(folder)
    sizes = None if shape is None else sizes_of(shape)
    return compress.random_networks(model, sparsity, pattern, sizes, seed)


def sizes_of(shape: str) -> tuple[int, ...]:
    """Sizes from text like 3x224x224.

    Raises:
        ValueError: Not such text.
    """
    parts = shape.lower().replace(",", "x").split("x")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"shape = {shape!r}: expected sizes joined by x, for example 3x224x224")
    return tuple(int(part) for part in parts)


def _measure(
    pair: Pair, example: Any, settings: Measurement, timeout: float
) -> list[dict[str, Any]]:
    from aerogel import bench, compress
    from aerogel.runtime.calls import run_example

    for size in settings.batches:  # an input of a wrong shape is no failure of an engine
        run_example(pair.dense, example(size), {})
    found = []
    with terminal.Terminal().task("bench") as task, bench.Workers(timeout) as workers:
        for size, count in compress.settings_of(settings):
            found.append(compress.measure(pair, example(size), count, settings, task, workers))
    return found


def _draw(found: list[dict[str, Any]], path: Path, title: str) -> None:
    """Write the page: plots, tables, layers, machine and command."""
    import sys
    from datetime import datetime, timezone

    from aerogel import bench, report
    from aerogel.atomic import write_atomic

    hardware = bench.hardware_info().to_dict()
    page = report.render({
        "title": title,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["aerogel", *sys.argv[1:]]),
        "latency": [one["latency"] for one in found],
        "layers": found[0]["layers"],
        "versions": hardware.pop("versions"),
        "hardware": hardware,
        "notes": _notes(found),
    })  # fmt: skip
    write_atomic(path, page)


def _notes(found: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(note for one in found for note in one["notes"]))


def _show(found: list[dict[str, Any]], *, explain: bool, as_json: bool) -> None:
    from aerogel.bench import BenchTable
    from aerogel.cli import screen
    from aerogel.report import Latency

    if as_json:
        terminal.print_json(found)
        return
    console = terminal.stdout()
    for one in found:
        console.print(BenchTable.from_dict(one["latency"]))
        console.print()
    latencies = [Latency.model_validate(one["latency"]) for one in found]
    for text in screen.verdicts(latencies):
        console.print(text, highlight=False, soft_wrap=True)
    for note in _notes(found):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    for one in found if explain else []:
        console.print(one["explanation"], highlight=False, markup=False, soft_wrap=True)
