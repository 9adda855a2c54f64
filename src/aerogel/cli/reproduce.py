"""`aerogel reproduce`: run the experiments behind the claims, and judge them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aerogel.cli import terminal

if TYPE_CHECKING:
    from aerogel.manifest import System
    from aerogel.report.evidence import Evidence

FAILED = 1


def reproduce(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="[SLUG]...", help="Systems, by slug.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every system.")] = False,
    family: Annotated[str | None, typer.Option(help="Every system of this family.")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Run only this seed; may be repeated.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the results in docs/evidence and redo the page.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Run experiments from this checkout and check what they claim.

    Prints our figure, the baseline's, the margin asked for, and pass or fail.
    Exits with 1 if a claim does not hold.

    Examples:

    - `aerogel reproduce gradual-pruning`
    - `aerogel reproduce --all --save` : also rewrites docs/evidence.md
    """
    with terminal.guarded("Finished experiments were kept only with --save."):
        from aerogel.report import evidence

        systems = _chosen(slugs or [], everything=everything, family=family)
        checkout = evidence.find_checkout()
        found = []
        for system in systems:
            found.append(_run(system, checkout, seed))
            if not as_json:
                _show(found[-1])
            if save:
                evidence.save_evidence(found[-1], checkout)
                evidence.write_page(checkout)
        if as_json:
            terminal.print_json([_finite(item.to_dict()) for item in found])
        if not all(item.passed for item in found):
            raise typer.Exit(FAILED)


def _chosen(slugs: list[str], *, everything: bool, family: str | None) -> list[System]:
    from aerogel import manifest

    if sum((bool(slugs), everything, family is not None)) != 1:
        known = ", ".join(system.slug for system in manifest.load_systems())
        raise ValueError(f"give slugs, or --all, or --family; systems: {known}")
    if slugs:
        return [manifest.find_system(slug) for slug in slugs]
    rows = [s for s in manifest.load_systems() if everything or s.family == family]
    if not rows:
        families = ", ".join(manifest.families())
        raise ValueError(f"family = {family!r} has no system; there are {families}")
    return rows


def _run(system: System, checkout: Path, seeds: list[int] | None) -> Evidence:
    from aerogel.report import evidence

    total = len(seeds or evidence.load_experiment(system, checkout).SEEDS)
    console = terminal.Terminal()
    begin = time.monotonic()
    done = 0
    with console.task(system.slug, "seeds") as task:
        task.update(0, total)

        def on_result(result: evidence.Result) -> None:
            nonlocal done
            done += 1
            task.update(done, total, f"seed {result.seed}: {result.seconds:.0f} s")

        found = evidence.reproduce(system, checkout=checkout, seeds=seeds, on_result=on_result)
    console.say(f"{system.slug}: {total} seeds in {time.monotonic() - begin:.0f} s")
    return found


def _show(found: Evidence) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=f"[bold]{found.slug}[/]", title_justify="left")
    for name in ("compared", "ours", "baseline", "margin", "at least", "", "paper"):
        is_text = name in ("compared", "", "paper")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for claim in found.claims:
        verdict = "[green]pass[/]" if claim.passed else "[bold red]FAIL[/]"
        unit = f" ({claim.unit})" if claim.unit else ""
        figures = (claim.ours, claim.baseline)
        margins = (claim.margin, claim.threshold)
        table.add_row(
            escape(claim.text + unit),
            *(f"{value:.2f}" for value in figures),
            *(f"{value:+.2f}" for value in margins),
            verdict,
            escape(claim.paper),
        )
    terminal.stdout().print(table)


def _finite(value: Any) -> Any:
    """JSON has no word for NaN: such a figure becomes null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
