"""`aerogel sat`: what N:M training would take on the SAT accelerator."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from aerogel.cli import terminal

if TYPE_CHECKING:
    from aerogel.insight import SATReport


def sat(
    model: Annotated[str, typer.Argument(help="A registered network, for example resnet18.")],
    nm: Annotated[str, typer.Option("--nm", help="Pattern of the weights, n:m.")] = "2:8",
    mode: Annotated[str, typer.Option(help="bdwp, sr_ste, sdwp, sdgp or dense.")] = "bdwp",
    batch: Annotated[int, typer.Option(help="Samples a training step.")] = 256,
    size: Annotated[int | None, typer.Option(help="Height and width of the images.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every stage.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Estimate a training step on SAT, the accelerator for N:M training of BDWP's paper.

    Example: `aerogel sat resnet18 --nm 2:8 --size 64`
    """
    from aerogel import models
    from aerogel.insight import SATModel

    with terminal.guarded():
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", nm)
        if match is None:
            raise ValueError(f"nm = {nm!r}: expected n:m, for example 2:8")
        network = models.create_model(model)
        shape = list(models.model_config(model)["input_size"])
        if size is not None:
            shape[-2:] = [size, size]
        report = SATModel().estimate(
            network,
            shape,
            batch,
            int(match[1]),
            int(match[2]),
            mode,  # type: ignore[arg-type]
        )
        if as_json:
            terminal.print_json(_facts(report) | {"stages": [asdict(s) for s in report.schedule]})
        else:
            _show(report, layers)


def _facts(report: SATReport) -> dict[str, float]:
    return {
        "cycles": report.cycles,
        "seconds": report.seconds,
        "speedup": report.speedup,
        "utilisation": report.utilisation,
        "gflops": report.gflops,
        "executed_gflops": report.executed_gflops,
    }


def _show(report: SATReport, layers: bool) -> None:
    from rich.table import Table

    console = terminal.stdout()
    if layers:
        table = Table("layer", "stage", "dataflow", "pattern", "cycles", "bound by")
        for stage in report.schedule:
            name = stage.layer or "(model)"
            row = (stage.stage, stage.dataflow, stage.pattern, f"{stage.cycles:,}", stage.bound_by)
            table.add_row(name, *row)
        console.print(table)
    console.print(
        f"{report.cycles:,} cycles a step, {1e3 * report.seconds:.1f} ms, "
        f"[bold]{report.speedup:.2f}x[/] the dense step\n"
        f"products {report.matmul_cycles:,}, update {report.update_cycles:,}, "
        f"selection {report.selection_cycles:,}, vector work {report.vector_cycles:,}\n"
        f"array busy {report.utilisation:.0%}; {report.gflops:.0f} GFLOP/s as if dense, "
        f"{report.executed_gflops:.0f} executed"
    )
