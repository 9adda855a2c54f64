"""`aerogel export`: a network as an ONNX file that other engines run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from aerogel.cli import terminal
from aerogel.cli.bench import sizes_of


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_DIR",
            help="The folder of a run, or a registered name, file or `import.path:callable`.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model.onnx"),
    shape: Annotated[
        str | None, typer.Option(help="One input's shape, e.g. 3x224x224, if MODEL has no own.")
    ] = None,
    opset: Annotated[
        int | None, typer.Option(min=18, help="Of the file.", show_default="the exporter's own")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Write a network as an ONNX file, checked in ONNX Runtime before it is kept.

    Of a run's folder the sparse network is written. The file is a plain dense one with the zeros
    in its weights: as large as the dense network, and read by every engine. `aerogel bench
    model.onnx --sparsity 0` and `aerogel.compile("model.onnx", ...)` find the zeros again.

    Examples:

    - `aerogel export runs/mine --out mine.onnx`
    - `aerogel export mobilenet_v2 --out mobilenet_v2.onnx`
    """
    with terminal.guarded("Nothing was written."):
        from aerogel import compress, runtime

        if (Path(model) / "recipe.yaml").is_file():
            pair, example = compress.load_run(Path(model))
            network = pair.sparse
        else:
            sizes = None if shape is None else sizes_of(shape)
            network, example = compress.plain_network(model, sizes)
        if not out.parent.is_dir():
            raise ValueError(f"out = {str(out)!r}: there is no folder {str(out.parent)!r}")
        with terminal.Terminal().task("export"):
            done = runtime.export_onnx(network, example(2), out, opset=opset)
        if as_json:
            terminal.print_json({**dataclasses.asdict(done), "path": str(done.path)})
            return
        batch = "any batch" if done.any_batch else "a batch of 2 only"
        terminal.stdout().print(
            f"{done.path}: {done.size / 1e6:.2f} MB, opset {done.opset}, {batch}, "
            f"{100 * done.sparsity:.1f} % zeros, within {done.deviation:.1e} of torch in ONNX "
            "Runtime",
            highlight=False,
            soft_wrap=True,
        )
