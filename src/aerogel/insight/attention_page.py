"""A study of sparse attentions as a table and as plots."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from aerogel.insight.attention_study import Row

_COLORS = ("#3b6fb6", "#d1702a", "#3f8f4f", "#a4407a", "#7a6ad8", "#8a6d3b", "#2b9aa0", "#666666")
_SYMBOLS = ("circle", "diamond", "square", "x", "cross", "triangle-up", "star", "pentagon")
_MILLI, _MEGA = 1e3, 1e6

Value = Callable[[Row], "float | None"]


def markdown(rows: Sequence[Row], title: str) -> str:
    """Two tables, of quality and of cost, with one row for each length and method.

    Args:
        rows: of `attention_study.run`.
        title: above them.
    """
    quality = ("tokens", "method", "kept pairs", "plain", "repeat", "needle", "key-value")
    cost = ("tokens", "method", "kept pairs", "prefill", "decode", "memory", "KV cache")
    lines = [
        f"# {title}",
        "",
        "Kept pairs: share of the causal pairs in prefill (in decoding). Plain and repeat: nats a "
        "token, of text and of a passage that returns at its end. Needle and key-value: right "
        "answers (nats of an answer token).",
        "",
        *_table(quality, [_quality(row) for row in rows]),
        "",
        "Times are of the whole model, selection included: a prompt, one token. Memory: the "
        "prompt's peak beyond the weights, KV cache included.",
        "",
        *_table(cost, [_cost(row) for row in rows]),
    ]
    failed = [
        f"- {row.method}, {row.length:,} tokens: {row.missing}" for row in rows if row.missing
    ]
    return "\n".join([*lines, *(["", "Not done:", "", *failed] if failed else [])]) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    align = f"| ---: | --- |{' ---: |' * (len(heads) - 2)}"
    return [f"| {' | '.join(heads)} |", align, *(f"| {' | '.join(row)} |" for row in rows)]


def _names(row: Row) -> list[str]:
    method = row.method.replace("|", "\\|")
    return [f"{row.length:,}", method, _both(row.density, row.decode_density, ".1%")]


def _quality(row: Row) -> list[str]:
    return [
        *_names(row),
        _one(row.plain, ".3f"),
        _one(row.repeat, ".3f"),
        _both(row.needle, row.needle_nats, ".0%", ".2f"),
        _both(row.pairs, row.pairs_nats, ".0%", ".2f"),
    ]


def _cost(row: Row) -> list[str]:
    return [
        *_names(row),
        _one(row.prefill_seconds, ".3g", " s"),
        _one(_scaled(row.decode_seconds, _MILLI), ".3g", " ms"),
        _one(_scaled(row.peak_bytes, 1 / _MEGA), ",.0f", " MB"),
        _one(_scaled(row.cache_bytes, 1 / _MEGA), ",.1f", " MB"),
    ]


def _one(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _both(first: float | None, second: float | None, form: str, other: str = "") -> str:
    if first is None:
        return _one(second, other or form)
    return _one(first, form) + ("" if second is None else f" ({second:{other or form}})")


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def page(rows: Sequence[Row], title: str) -> str:
    """A page of plots: quality against density; times and memory against length.

    Args:
        rows: of `attention_study.run`.
        title: of the page.
    """
    from plotly.subplots import make_subplots

    panels: tuple[tuple[str, Value, Value, str, str], ...] = (
        ("Repeated passage", _density, lambda r: r.repeat, "kept pairs", "nats a token"),
        ("Plain text", _density, lambda r: r.plain, "kept pairs", "nats a token"),
        ("Needle", _density, lambda r: r.needle_nats, "kept pairs", "nats a token"),
        ("Keys and values", _density, lambda r: r.pairs_nats, "kept pairs", "nats a token"),
        ("Prefill", _length, lambda r: r.prefill_seconds, "tokens", "seconds"),
        ("Decode", _length, lambda r: _scaled(r.decode_seconds, _MILLI), "tokens", "ms a token"),
        ("Extra memory", _length, lambda r: _scaled(r.peak_bytes, 1 / _MEGA), "tokens", "MB"),
        ("Density", _length, _density, "tokens", "kept pairs"),
    )
    figure = make_subplots(2, 4, subplot_titles=[p[0] for p in panels], vertical_spacing=0.14)
    for place, (_, x, y, across, up) in enumerate(panels):
        at = {"row": place // 4 + 1, "col": place % 4 + 1}
        _draw(figure, rows, x, y, by_length=x is _density, first=place == 0, at=at)
        shares = {"tickformat": ".0%"}
        figure.update_xaxes(title=across, **(shares if x is _density else {"type": "log"}), **at)
        figure.update_yaxes(title=up, **(shares if y is _density else {}), **at)
        if place in (4, 6):
            figure.update_yaxes(type="log", **at)
    figure.update_layout(title=html.escape(title), height=860)
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


def _draw(
    figure: object,
    rows: Sequence[Row],
    x: Value,
    y: Value,
    *,
    by_length: bool,
    first: bool,
    at: dict[str, int],
) -> None:
    """One trace a method: points of all lengths, joined where length is the axis."""
    from plotly import graph_objects

    lengths = sorted({row.length for row in rows})
    for index, method in enumerate(dict.fromkeys(row.method for row in rows)):
        mine = [r for r in rows if r.method == method and None not in (x(r), y(r))]
        symbols = [_SYMBOLS[lengths.index(r.length) % len(_SYMBOLS)] for r in mine]
        trace = graph_objects.Scatter(
            x=[x(r) for r in mine],
            y=[y(r) for r in mine],
            text=[html.escape(f"{method}, {r.length:,} tokens") for r in mine],
            mode="markers" if by_length else "lines+markers",
            name=html.escape(method),
            legendgroup=method,
            showlegend=first,
            marker={"symbol": symbols, "size": 9},
            line={"color": _COLORS[index % len(_COLORS)]},
            marker_color=_COLORS[index % len(_COLORS)],
        )
        figure.add_trace(trace, **at)  # type: ignore[attr-defined]


def _density(row: Row) -> float | None:
    return row.density


def _length(row: Row) -> float | None:
    return row.length
