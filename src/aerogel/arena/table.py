"""An arena's outcome as a table and as a plot."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from typing import Any

from aerogel.arena.run import Outcome, Row


def markdown(outcome: Outcome) -> str:
    """One row for each method and sparsity: means over seeds, the best accuracy of a sparsity bold.

    Args:
        outcome: Of `run`.
    """
    arena = outcome.arena
    lines = [
        f"# Arena: {arena.model} on {arena.data}",
        "",
        f"Means over {len(arena.seeds)} seed{'s' * (len(arena.seeds) != 1)}; time of one compiled "
        "call, batch 1, one thread, against the dense network in eager torch.",
        "",
        "| zeros | method | pattern | accuracy | against dense | time | size | not run |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for sparsity in arena.sparsities:
        groups = _by_method(outcome, sparsity)
        best = max((_mean([r.accuracy for r in rows]) or 0.0 for rows in groups), default=0.0)
        ranked = sorted(groups, key=lambda rows: -(_mean([r.accuracy for r in rows]) or -1.0))
        lines += [_line(sparsity, rows, best) for rows in ranked]
    return "\n".join(lines) + "\n"


def _line(sparsity: float, rows: Sequence[Row], best: float) -> str:
    first = rows[0]
    ran = [row for row in rows if not row.missing]
    cells = [f"{sparsity:.0%}", first.method, first.pattern or "-"]
    if not ran:
        return f"| {' | '.join([*cells, *['-'] * 4, first.missing])} |"
    accuracy, dense = _mean([r.accuracy for r in ran]), _mean([r.dense_accuracy for r in ran])
    shown = "-" if accuracy is None else f"{accuracy:.2%}"
    if accuracy is not None and accuracy == best:
        shown = f"**{shown}**"
    margin = "-" if accuracy is None or dense is None else f"{100 * (accuracy - dense):+.2f}"
    faster = _mean([_ratio(r.dense_seconds, r.seconds) for r in ran])
    smaller = _mean([_ratio(r.dense_bytes, r.bytes) for r in ran])
    cells += [
        shown,
        margin,
        _times(faster, "faster", "slower"),
        _times(smaller, "smaller", "larger"),
    ]
    failed = [row.missing for row in rows if row.missing]
    return f"| {' | '.join([*cells, failed[0] if failed else '-'])} |"


def page(outcome: Outcome) -> str:
    """A page with the table and accuracy plotted against time and against size.

    Args:
        outcome: Of `run`.
    """
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04)
    methods = list(dict.fromkeys(row.method for row in outcome.rows if not row.missing))
    for index, method in enumerate(methods):
        points = _points(outcome, method)
        for column, values in ((1, [p[1] for p in points]), (2, [p[2] for p in points])):
            trace = graph_objects.Scatter(
                x=values,
                y=[p[0] for p in points],
                text=[f"{method}, {p[3]:.0%} zeros" for p in points],
                mode="lines+markers",
                name=method,
                legendgroup=method,
                showlegend=column == 1,
                line={"color": _COLORS[index % len(_COLORS)]},
                marker={"size": 9, "symbol": _SYMBOLS[index // len(_COLORS) % len(_SYMBOLS)]},
            )
            figure.add_trace(trace, 1, column)
    _add_dense(figure, outcome)
    figure.update_xaxes(title="time of a call, ms", **_AXIS, row=1, col=1)
    figure.update_xaxes(title="file, kB", **_AXIS, row=1, col=2)
    figure.update_yaxes(title="accuracy", tickformat=".0%", row=1, col=1)
    title = f"{outcome.arena.model} on {outcome.arena.data}"
    figure.update_layout(title=html.escape(title), height=560, template="plotly_white")
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


_COLORS = ("#3b6fb6", "#d1702a", "#3f8f4f", "#a4407a", "#7a6ad8", "#8a6d3b", "#2b9aa0", "#666666")
# With these, three times as many methods can be told apart.
_SYMBOLS = ("circle", "diamond", "square")
_TICKS = [digit * 10.0**power for power in range(-4, 8) for digit in (1, 2, 5)]
_AXIS = {"type": "log", "tickvals": _TICKS, "ticktext": [f"{tick:,.6g}" for tick in _TICKS]}


def _add_dense(figure: Any, outcome: Outcome) -> None:
    """The dense network in eager torch, which all others are compared with."""
    ran = [row for row in outcome.rows if not row.missing]
    accuracy = _mean([row.dense_accuracy for row in ran])
    seconds = _mean([row.dense_seconds for row in ran])
    size = _mean([row.dense_bytes for row in ran])
    if accuracy is None or seconds is None or size is None:
        return
    for column, value in ((1, 1e3 * seconds), (2, size / 1e3)):
        figure.add_scatter(
            x=[value],
            y=[accuracy],
            mode="markers",
            name="dense, eager torch",
            legendgroup="dense",
            showlegend=column == 1,
            marker={"color": "black", "size": 13, "symbol": "star"},
            row=1,
            col=column,
        )


def _points(outcome: Outcome, method: str) -> list[tuple[float, float, float, float]]:
    """(accuracy, milliseconds, kilobytes, sparsity) for each sparsity that ran."""
    found = []
    for sparsity in outcome.arena.sparsities:
        rows = [
            r
            for r in outcome.rows
            if r.method == method and r.sparsity == sparsity and not r.missing
        ]
        means = [_mean([r.accuracy for r in rows]), _mean([r.seconds for r in rows]),
                 _mean([r.bytes for r in rows])]  # fmt: skip
        accuracy, seconds, size = means
        if accuracy is not None and seconds is not None and size is not None:
            found.append((accuracy, 1e3 * seconds, size / 1e3, sparsity))
    return found


def _by_method(outcome: Outcome, sparsity: float) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in outcome.rows:
        if row.sparsity == sparsity:
            groups.setdefault(row.method, []).append(row)
    return list(groups.values())


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _mean(values: Sequence[float | int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _times(value: float | None, more: str, less: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}x {more}" if value >= 1 else f"{1 / value:.2f}x {less}"
