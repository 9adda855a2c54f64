"""The one screen at the end of `aerogel compress`: what it cost, what was won, where to look."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aerogel.report import EngineTime, Latency, Metric, Results, times_faster

OURS, EAGER = "aerogel", "torch eager"


def show(results: Results, folder: Path, console: Console) -> None:
    """Print the screen.

    Args:
        results: What the run found.
        folder: Where it wrote its files.
        console: Where to print.
    """
    subject, sparsity = results.subject, results.size.sparsity
    zeros = f"{100 * sparsity:.1f} % zeros in the pruned layers" if sparsity is not None else ""
    _line(
        console,
        f"\n[bold]{escape(subject.model)}[/] on [bold]{escape(subject.data)}[/]: "
        f"{zeros} ({escape(subject.pattern)}, {escape(subject.method)})",
    )
    console.print(_quality(results))
    if results.latency:
        console.print()
        console.print(latency_table(results.latency))
        for text in [*missing_engines(results.latency), *verdicts(results.latency)]:
            _line(console, text)
    _line(console, f"\nreport  [bold]{escape(str(folder / 'report.html'))}[/]")
    _line(console, f"model   {escape(str(folder / 'model.safetensors'))}")


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _quality(results: Results) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("sparse", justify="right")
    table.add_column("")
    for metric in results.quality:
        table.add_row(escape(metric.name), *_metric(metric))
    size = results.size
    if size.dense_bytes and size.sparse_bytes:
        ratio = f"{size.dense_bytes / size.sparse_bytes:.1f}x smaller"
        table.add_row("file", _bytes(size.dense_bytes), _bytes(size.sparse_bytes), ratio)
    if size.parameters and size.nonzero is not None:
        table.add_row("numbers", f"{size.parameters:,}", f"{size.nonzero:,}", "that are not zero")
    return table


def _metric(metric: Metric) -> tuple[str, str, str]:
    dense, sparse = _value(metric.dense, metric.unit), _value(metric.sparse, metric.unit)
    if metric.dense is None or metric.sparse is None:
        return dense, sparse, ""
    difference = metric.sparse - metric.dense
    if metric.unit == "fraction":
        return dense, sparse, f"{100 * difference:+.2f} points"
    return dense, sparse, f"{difference:+.4g}"


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if unit == "fraction" else f"{value:.4g}"


def latency_table(latencies: list[Latency]) -> Table:
    """One row an engine, one column a setting: time, and speed relative to the baseline."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("engine")
    for latency in latencies:
        table.add_column(_setting(latency), justify="right")
    best = [latency.fastest() for latency in latencies]
    for label in dict.fromkeys(row.label for latency in latencies for row in latency.rows):
        rows = [_row(latency, label) for latency in latencies]
        if not any(row and row.median for row in rows):
            continue
        cells = [_time(row, row is top) for row, top in zip(rows, best, strict=True)]
        ours = any(row and row.engine == OURS for row in rows)
        table.add_row(f"[bold]{escape(label)}[/]" if ours else escape(label), *cells)
    return table


def missing_engines(latencies: list[Latency]) -> list[str]:
    """A line for each engine that could not run, with the reason."""
    reasons = {
        row.label: row.missing for latency in latencies for row in latency.rows if row.missing
    }
    return [f"[dim]not run: {escape(name)}: {escape(why)}[/]" for name, why in reasons.items()]


def verdicts(latencies: list[Latency]) -> list[str]:
    """A line for each setting: the sparse network against eager torch and the best engines."""
    lines = []
    for latency in latencies:
        ours = next((r for r in latency.rows if r.engine == OURS and r.weights == "sparse"), None)
        if ours is None or not ours.median:
            continue
        against = [f"{ours.ratio:.2f}x {escape(latency.baseline)}"] if ours.ratio else []
        rival = latency.fastest("dense", skip=OURS)
        if rival is not None:
            name = f"the fastest dense engine ({escape(rival.engine)})"
            against.append(f"[bold]{times_faster(ours, rival):.2f}x[/] {name}")
        against += [
            f"{times_faster(ours, row):.2f}x {escape(row.engine)} with the same zeros"
            for row in latency.rows
            if row.weights == "sparse" and row.median and row.engine not in (OURS, EAGER)
        ]
        if against:
            said = ", ".join(against)
            lines.append(f"{_setting(latency)}: aerogel runs the sparse network at {said}")
    return lines


def _setting(latency: Latency) -> str:
    threads = f"{latency.threads} thread{'s' * (latency.threads != 1)}"
    return f"batch {latency.batch}, {threads}" if latency.batch else threads


def _row(latency: Latency, label: str) -> EngineTime | None:
    return next((row for row in latency.rows if row.label == label), None)


def _time(row: EngineTime | None, best: bool) -> str:
    if row is None or row.median is None:
        return "-"
    ratio = f"{row.ratio:5.2f}x" if row.ratio is not None else "      "
    cell = f"{1e3 * row.median:.3f} ms {ratio}"
    return f"[bold green]{cell}[/]" if best else cell


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
