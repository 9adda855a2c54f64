"""The report's plots, as plotly.js reads them: plain dicts of data and layout.

Colours are names of the page's CSS variables; the page's script puts in their values, so that
plots follow the reader's light or dark theme. Likewise `meta` says how many pixels of text stand
behind a bar of the length `most`, and the script sets the axis so that they fit. Text is
HTML-escaped, because plotly reads a little HTML in labels.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Any, Literal

from aerogel.report import wording
from aerogel.report.schema import Curve, EngineTime, Latency, Layer, Metric, Size

DENSE, SPARSE, OURS = "var(--dense)", "var(--sparse)", "var(--accent)"
INK, MUTED, LINE, FAINT = "var(--ink)", "var(--muted)", "var(--line)", "var(--faint)"

# More bars than this cannot be told apart; the table below the plot has all layers.
MAX_LAYERS = 60
_BAR_HEIGHT, _FRAME_HEIGHT = 30, 64
_LAYER_HEIGHT = 20
_CURVE_TITLES = {"lr": "learning rate"}
_CURVE_ORDER = ("loss", "accuracy", "sparsity", "lr")


@dataclass(frozen=True)
class Mark:
    """An entry of a legend: the page draws it, so that it wraps like text and reads aloud."""

    label: str
    color: str
    shape: Literal["bar", "line", "dots"] = "bar"


_PAIR = [Mark("dense", DENSE), Mark("sparse", OURS)]


@dataclass(frozen=True)
class Figure:
    """One plot.

    Attributes:
        key: Its element's id.
        title: Heading above it.
        summary: What it shows, for those who cannot see it.
        height: Pixels; the width is the page's.
        data: plotly traces.
        layout: plotly layout.
        legend: What each colour means, where there is more than one.
    """

    key: str
    title: str
    summary: str
    height: int
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    legend: list[Mark] = field(default_factory=list)


def latency(setting: Latency, position: int) -> Figure | None:
    """Horizontal bars, the fastest first; whiskers are quartiles over rounds."""
    rows = sorted((r for r in setting.rows if r.median), key=_median)
    if not rows:
        return None
    unit, factor = ("ms", 1e3) if _median(rows[-1]) >= 1e-3 else ("µs", 1e6)
    values = [_median(r) * factor for r in rows]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": list(range(len(rows))),
        "marker": {"color": [_engine_color(r) for r in rows]},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [((r.high or _median(r)) - _median(r)) * factor for r in rows],
            "arrayminus": [(_median(r) - (r.low or _median(r))) * factor for r in rows],
            "color": INK,
            "thickness": 1,
            "width": 3,
        },
        "customdata": [_safe(r.label) for r in rows],
        "hovertemplate": f"%{{customdata}}: %{{x:.4g}} {unit}<extra></extra>",
    }
    most = max((r.high or _median(r)) * factor for r in rows)
    # Beside the whiskers, not at the bars' ends, where the whiskers would cross the text.
    notes = [
        _note(max(values[i], (r.high or 0.0) * factor), i, _bar_text(r)) for i, r in enumerate(rows)
    ]
    title = wording.threads(setting.threads)
    if setting.batch is not None:
        title = f"Batch {setting.batch}, {title}"
    best = rows[0]
    return Figure(
        key=f"latency-{position}",
        title=title,
        summary=f"{title}: the fastest of {len(rows)} is {best.label} at "
        f"{wording.seconds(best.median)} a call.",
        height=_BAR_HEIGHT * len(rows) + _FRAME_HEIGHT,
        data=[bars],
        layout=_layout(
            xaxis={"title": {"text": f"time of one call, {unit}"}},
            yaxis=_categories([r.label for r in rows]),
            meta={"most": most, "room": 118},
            annotations=notes,
            bargap=0.35,
        ),
    )


def quality(metrics: list[Metric]) -> Figure | None:
    """Dense beside sparse, for figures that are fractions, on the whole scale from 0 to 100 %."""
    shown = [m for m in metrics if m.unit == "fraction" and None not in (m.dense, m.sparse)]
    if not shown:
        return None
    names = [m.name for m in shown]
    summary = "; ".join(
        f"{m.name}: dense {wording.percent(m.dense, 2)}, sparse {wording.percent(m.sparse, 2)}"
        for m in shown
    )
    data = [
        _pair_bar("dense", DENSE, [100 * (m.dense or 0) for m in shown],
                  [wording.percent(m.dense, 2) for m in shown]),
        _pair_bar("sparse", OURS, [100 * (m.sparse or 0) for m in shown],
                  [wording.percent(m.sparse, 2) for m in shown]),
    ]  # fmt: skip
    return Figure(
        key="quality",
        title="Quality",
        summary=f"{summary}.",
        height=2 * _BAR_HEIGHT * len(shown) + _FRAME_HEIGHT,
        data=data,
        layout=_layout(
            xaxis=_percent_axis(),
            yaxis=_categories(names),
            meta={"most": 100, "room": 60},
            barmode="group",
            bargroupgap=0.12,
        ),
        legend=_PAIR,
    )


def file_size(sizes: Size) -> Figure | None:
    """Two bars: what the two networks take on disk."""
    if not sizes.dense_bytes or not sizes.sparse_bytes:
        return None
    pair = [sizes.dense_bytes, sizes.sparse_bytes]
    unit, factor = ("MB", 1e-6) if max(pair) >= 1e6 else ("kB", 1e-3)
    bars = _pair_bar("", DENSE, [b * factor for b in pair], [wording.size(b) for b in pair])
    bars["marker"]["color"] = [DENSE, OURS]
    return Figure(
        key="size",
        title="Size on disk",
        summary=f"The dense file has {wording.size(pair[0])}, the sparse one "
        f"{wording.size(pair[1])}.",
        height=2 * _BAR_HEIGHT + _FRAME_HEIGHT,
        data=[bars],
        layout=_layout(
            xaxis={"title": {"text": unit}},
            yaxis=_categories(["dense", "sparse"]),
            meta={"most": max(pair) * factor, "room": 60},
            bargap=0.35,
        ),
    )


def layer_sparsity(layers: list[Layer]) -> Figure | None:
    """Zeros in each layer's weight, in the order of execution."""
    rows = _shown_layers([layer for layer in layers if layer.sparsity is not None])
    if not rows:
        return None
    values = [100 * (row.sparsity or 0) for row in rows]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": list(range(len(rows))),
        "marker": {"color": OURS},
        "customdata": [_safe(row.name) for row in rows],
        "hovertemplate": "%{customdata}: %{x:.1f} % zeros<extra></extra>",
    }
    return Figure(
        key="layer-sparsity",
        title="Zeros by layer",
        summary=f"Zeros in {len(rows)} layers, from {min(values):.0f} to {max(values):.0f} %.",
        height=_LAYER_HEIGHT * len(rows) + _FRAME_HEIGHT,
        data=[bars],
        layout=_layout(
            xaxis={**_percent_axis(), "range": [0, 106]},
            yaxis=_categories(wording.within_parent([row.name for row in rows]), size=11),
            bargap=0.3,
        ),
    )


def layer_time(layers: list[Layer]) -> Figure | None:
    """Each layer's time as dense torch and as the best kernel that skips its zeros."""
    rows = _shown_layers([r for r in layers if r.seconds_dense or r.seconds_sparse])
    if not rows:
        return None
    times = [t for r in rows for t in (r.seconds_dense, r.seconds_sparse) if t]
    unit, factor = ("ms", 1e3) if max(times) >= 1e-3 else ("µs", 1e6)
    data = []
    for name, color in (("dense", DENSE), ("sparse", OURS)):
        found = [getattr(r, f"seconds_{name}") for r in rows]
        data.append({
            "type": "bar",
            "orientation": "h",
            "name": name,
            "x": [None if t is None else t * factor for t in found],
            "y": list(range(len(rows))),
            "marker": {"color": color},
            "customdata": [_safe(r.name) for r in rows],
            "hovertemplate": f"%{{customdata}}, {name}: %{{x:.4g}} {unit}<extra></extra>",
        })  # fmt: skip
    total = [sum(getattr(r, f"seconds_{n}") or 0.0 for r in rows) for n in ("dense", "sparse")]
    return Figure(
        key="layer-time",
        title="Time by layer",
        summary=f"{len(rows)} layers; together dense {wording.seconds(total[0])}, "
        f"those with a sparse kernel {wording.seconds(total[1])}.",
        height=_LAYER_HEIGHT * len(rows) + _FRAME_HEIGHT,
        data=data,
        layout=_layout(
            xaxis={"title": {"text": unit}, "rangemode": "tozero"},
            yaxis=_categories(wording.within_parent([r.name for r in rows]), size=11),
            barmode="group",
            bargap=0.25,
        ),
        legend=_PAIR,
    )


def curves(all_curves: list[Curve]) -> list[Figure]:
    """One plot for each quantity; stages, and training and test, as lines in it."""
    panels: dict[str, list[Curve]] = {}
    for curve in all_curves:
        if any(value is not None for value in curve.values):
            panels.setdefault(curve.name.removeprefix("test "), []).append(curve)
    last = len(_CURVE_ORDER)
    order = sorted(panels, key=lambda n: _CURVE_ORDER.index(n) if n in _CURVE_ORDER else last)
    return [_curve_panel(name, panels[name], i) for i, name in enumerate(order)]


def _curve_panel(name: str, group: list[Curve], position: int) -> Figure:
    # Fractions are shown in percent wherever this quantity never leaves [0, 1] by its nature.
    percent = name in ("sparsity", "accuracy", "top-1", "top-5", "recall@1")
    factor = 100 if percent else 1
    data, legend = [], []
    for curve in group:
        test = curve.name.startswith("test ")
        label = ", ".join(filter(None, [curve.stage, "test" if test else ""])) or name
        color = DENSE if curve.stage == "dense" else OURS
        legend.append(Mark(label, color, "dots" if test else "line"))
        data.append({
            "type": "scatter",
            "mode": "lines+markers" if test or len(curve.steps) < 3 else "lines",
            "name": _safe(label),
            "x": curve.steps,
            "y": [None if v is None else v * factor for v in curve.values],
            "line": {"color": color, "width": 2, "dash": "dot" if test else "solid"},
            "marker": {"size": 5},
            "connectgaps": True,
        })  # fmt: skip
    title = _CURVE_TITLES.get(name, name)
    last = [next((v for v in reversed(c.values) if v is not None), None) for c in group]
    ends = ", ".join(
        f"{c.stage} {c.name} ends at {wording.percent(v) if percent else wording.number(v)}"
        for c, v in zip(group, last, strict=True)
    )
    return Figure(
        key=f"curve-{position}",
        title=title[:1].upper() + title[1:],
        summary=f"{title} over optimizer steps: {ends}.",
        height=230,
        data=data,
        layout=_layout(
            xaxis={"title": {"text": "optimizer step"}, "showgrid": False},
            yaxis={"ticksuffix": " %" if percent else "", "gridcolor": FAINT, "zeroline": False,
                   "automargin": True, "nticks": 6},
        ),
        legend=legend,
    )  # fmt: skip


def _median(row: EngineTime) -> float:
    return row.median or 0.0


def _engine_color(row: EngineTime) -> str:
    if row.engine == "aerogel":
        return OURS
    return SPARSE if row.weights == "sparse" else DENSE


def _bar_text(row: EngineTime) -> str:
    text = wording.seconds(row.median)
    return text if row.ratio is None else f"{text}  <b>{wording.ratio(row.ratio)}</b>"


def _note(x: float, y: int, text: str) -> dict[str, Any]:
    return {"x": x, "y": y, "text": text, "showarrow": False, "xanchor": "left", "xshift": 6,
            "font": {"size": 12, "color": INK}}  # fmt: skip


def _pair_bar(name: str, color: str, values: list[float], texts: list[str]) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": values,
        "y": list(range(len(values))),
        "text": texts,
        "textposition": "outside",
        "textfont": {"color": INK, "size": 12},
        "cliponaxis": False,
        "hoverinfo": "skip",
        "marker": {"color": color},
    }


def _shown_layers(rows: list[Layer]) -> list[Layer]:
    """The slowest layers where there are too many, still in the order of execution."""
    if len(rows) <= MAX_LAYERS:
        return rows
    order = sorted(range(len(rows)), key=lambda i: -(rows[i].seconds_dense or 0.0))
    return [rows[i] for i in sorted(order[:MAX_LAYERS])]


def _categories(labels: list[str], size: int = 12) -> dict[str, Any]:
    return {
        "tickvals": list(range(len(labels))),
        "ticktext": [_safe(wording.clipped(label)) + "  " for label in labels],
        "tickfont": {"size": size, "color": INK},
        "range": [len(labels) - 0.4, -0.6],
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
    }


def _percent_axis() -> dict[str, Any]:
    ticks = [0, 25, 50, 75, 100]
    return {"tickvals": ticks, "ticktext": [f"{tick} %" for tick in ticks], "tickangle": 0}


def _layout(**parts: Any) -> dict[str, Any]:
    axis = {"gridcolor": FAINT, "linecolor": LINE, "zeroline": False, "tickcolor": LINE,
            "tickfont": {"size": 11, "color": MUTED}, "fixedrange": True}  # fmt: skip
    base: dict[str, Any] = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "inherit", "size": 12, "color": MUTED},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 44},
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": LINE, "font": {"color": INK}},
        "showlegend": False,
        "dragmode": False,
    }
    for name in ("xaxis", "yaxis"):
        parts[name] = {**axis, **parts.get(name, {})}
        if "title" in parts[name]:
            parts[name]["title"] = {**parts[name]["title"], "standoff": 8, "font": {"size": 11}}
    return {**base, **parts}


def _safe(text: str) -> str:
    return html.escape(text, quote=False)
