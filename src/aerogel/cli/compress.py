"""`aerogel compress`: from a network and data to a sparse, fast network with a report."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aerogel.cli import terminal

if TYPE_CHECKING:
    from aerogel.compress import Recipe

_AFTER_INTERRUPT = "The same command goes on from here, with the same result."


def compress(
    model_name: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Same as --model.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Registered name, file or folder, or `import.path:callable`."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help='File of weights to start from, or "pretrained".')
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Registered name, or a folder with one folder a class.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Pruning method: a slug.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of zeros, in [0, 1).")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Which weights go together: unstructured, 4x1, 2:4, ...")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="YAML file, or a built-in recipe: demo, minilm, digits.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="runs/NAME")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random choice.")] = None,
    dense_epochs: Annotated[float | None, typer.Option(help="Length of dense training.")] = None,
    prune_epochs: Annotated[float | None, typer.Option(help="Length of pruning.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for training.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an earlier run left in --out.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Make a network sparse, keep its accuracy, measure what was won.

    Trains (or loads) the dense network, prunes it while fine-tuning, evaluates both, saves both,
    and times them against every dense engine installed. Writes `model.safetensors`, `recipe.yaml`,
    `results.json` and `report.html`. A run that was stopped goes on when the command is repeated.

    Examples:

    - `aerogel compress` : a MobileNet on Fashion-MNIST, from scratch
    - `aerogel compress minilm --data wordnet-glosses` : a pretrained sentence encoder
    - `aerogel compress my_nets:resnet --data photos/ --sparsity 0.8 --pattern 4x1`
    - `aerogel compress --recipe runs/first/recipe.yaml --out runs/again`
    """
    with terminal.guarded(_AFTER_INTERRUPT):
        if model_name is not None and model not in (None, model_name):
            raise ValueError(f"two models are given: {model_name!r} and --model {model!r}")
        flags: dict[str, Any] = {
            "model.name": model if model is not None else model_name,
            "model.weights": weights,
            "data.name": data,
            "method": method,
            "sparsity": sparsity,
            "pattern": pattern,
            "seed": seed,
            "dense.epochs": dense_epochs,
            "prune.epochs": prune_epochs,
        }
        _run(flags, recipe, out, threads, restart=restart, as_json=as_json)


def _run(
    flags: dict[str, Any],
    recipe: str | None,
    out: Path | None,
    threads: int | None,
    *,
    restart: bool,
    as_json: bool,
) -> None:
    import torch

    from aerogel import compress as pipeline

    effective = pipeline.load_recipe(recipe, flags)
    folder = out or default_folder(effective)
    if threads is not None:
        torch.set_num_threads(threads)
    command = shlex.join(["aerogel", *sys.argv[1:]])
    results = pipeline.run(
        effective, folder, console=terminal.Terminal(), restart=restart, command=command
    )
    if results is None:  # a rank above 0
        return
    if as_json:
        terminal.print_json(results.to_dict())
    else:
        from aerogel.cli import screen

        screen.show(results, folder, terminal.stdout())


def default_folder(recipe: Recipe) -> Path:
    """`runs/MODEL-PATTERN-PERCENT`, with nothing a file system would stumble over."""
    percent = f"{100 * recipe.sparsity:g}"
    model = Path(recipe.model.name).stem if "/" in recipe.model.name else recipe.model.name
    name = f"{model}-{recipe.data.name}-{recipe.pattern}-{percent}"
    return Path("runs") / re.sub(r"[^\w.+-]+", "_", name)
