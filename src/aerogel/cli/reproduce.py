"""`aerogel reproduce`: run the experiments behind the claims, and judge them."""

from __future__ import annotations

import math
import os
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    workers: Annotated[
        int | None, typer.Option(min=1, help="Experiments at a time; as many as cores by default.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the results in docs/evidence and redo the page.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Run experiments from this checkout and check what they claim.

    Prints our figure, the baseline's, the margin asked for, and pass or fail.
    Exits with 1 if a claim does not hold. Each experiment runs on one thread, the longest first;
    its time is CPU time, which other work on the machine does not lengthen.

    Examples:

    - `aerogel reproduce gradual-pruning`
    - `aerogel reproduce --family pruning --workers 2`
    - `aerogel reproduce --all --save` : also rewrites docs/evidence.md
    """
    with terminal.guarded("Finished experiments were kept only with --save."):
        from aerogel.report import evidence
        from aerogel.report.schema import finite

        systems = _chosen(slugs or [], everything=everything, family=family)
        checkout = evidence.find_checkout()
        at_a_time = workers or os.cpu_count() or 1
        console = terminal.Terminal()
        found = []
        with closing(_all(systems, checkout, seed, at_a_time, console)) as runs:
            for item in runs:
                found.append(item)
                if not as_json:
                    _show(item)
                if save:
                    evidence.save_evidence(item, checkout)
                    evidence.write_page(checkout)
        _say_seconds(found, console)
        if as_json:
            terminal.print_json([finite(item.to_dict()) for item in found])
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


def _all(
    systems: list[System],
    checkout: Path,
    seeds: list[int] | None,
    workers: int,
    console: terminal.Terminal,
) -> Generator[Evidence]:
    """Evidence as it comes; several at a time, the longest first by what is kept of them."""
    from aerogel.arena import executors
    from aerogel.report import evidence

    each, _ = executors.start("processes", workers)
    if min(workers, len(systems)) == 1:
        yield from each(_watched, [(system, checkout, seeds, console) for system in systems])
        return
    kept = evidence.load_kept(systems, checkout)
    lengths = {item.slug: item.seconds for item in kept}
    ordered = sorted(systems, key=lambda system: -lengths.get(system.slug, math.inf))
    with (
        console.task("reproduce", "experiments") as task,
        closing(each(_unwatched, [(system, checkout, seeds) for system in ordered])) as done,
    ):
        task.update(0, len(ordered))
        for count, item in enumerate(done, 1):
            task.update(count, len(ordered), f"{item.slug}: {item.seconds:.0f} s")
            yield item


def _unwatched(system: System, checkout: Path, seeds: list[int] | None) -> Evidence:
    from aerogel.report import evidence

    return evidence.reproduce(system, checkout=checkout, seeds=seeds)


def _watched(
    system: System, checkout: Path, seeds: list[int] | None, console: terminal.Terminal
) -> Evidence:
    from aerogel.report import evidence

    total = len(seeds or evidence.load_experiment(system, checkout).SEEDS)
    done = 0
    with console.task(system.slug, "seeds") as task:
        task.update(0, total)

        def on_result(result: evidence.Result) -> None:
            nonlocal done
            done += 1
            task.update(done, total, f"seed {result.seed}: {result.seconds:.0f} s")

        return evidence.reproduce(system, checkout=checkout, seeds=seeds, on_result=on_result)


def _say_seconds(found: list[Evidence], console: terminal.Terminal) -> None:
    """CPU time of each experiment, and of all."""
    width = max(len(name) for name in ("all, CPU time", *(item.slug for item in found)))
    for item in sorted(found, key=lambda item: -item.seconds):
        console.say(f"{item.slug:{width}} {item.seconds:8,.0f} s, {len(item.seeds)} seeds")
    total = sum(item.seconds for item in found)
    console.say(f"{'all, CPU time':{width}} {total:8,.0f} s")


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
