"""From results to one HTML file that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from aerogel.report import figures, wording
from aerogel.report.figures import Figure
from aerogel.report.schema import EngineTime, Latency, Results, times_faster

OURS = "aerogel"
EAGER = "torch eager"


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    detail: str
    accent: bool = False


@dataclass(frozen=True)
class Table:
    """Numbers under a plot, for those who cannot see it or want them exactly."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    numeric: list[int] = field(default_factory=list)  # columns set flush right


@dataclass(frozen=True)
class Panel:
    """A plot, where there is something to plot, with its table and remarks."""

    figure: Figure | None
    table: Table | None
    remarks: list[str] = field(default_factory=list)


def render(results: Results | Mapping[str, Any]) -> str:
    """Draw the report.

    Args:
        results: What a run found: a `Results`, or the content of its `results.json`.

    Returns:
        A whole HTML document with styles, scripts and data inside.

    Raises:
        ValueError: `results` is not of the schema.
    """
    if not isinstance(results, Results):
        results = Results.model_validate(results)
    sections = {
        "latency": [_latency_panel(s, i) for i, s in enumerate(results.latency)],
        "outcome": list(_outcome_panels(results)),
        "layers": list(_layer_panels(results)),
        "curves": [Panel(figure, None) for figure in figures.curves(results.curves)],
    }
    drawn = [p.figure for panels in sections.values() for p in panels if p.figure]
    plots = [asdict(f) for f in drawn]
    return _template().render(
        results=results,
        sections=sections,
        tiles=list(_tiles(results)),
        machine=_machine(results),
        stages=[(s.name, wording.seconds(s.seconds), s.note) for s in results.stages],
        layer_table=_layer_table(results),
        plots=plots,
        css=_asset("page.css"),
        js=_asset("page.js"),
        plotly=_plotly() if plots else "",
    )


def _asset(name: str) -> Markup:
    return Markup((resources.files("aerogel.report") / "assets" / name).read_text("utf-8"))


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(str(_asset("page.html.j2")))


@cache
def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    # The only way out of a script element is its end tag, which the library does not contain
    # except, perhaps one day, inside a string.
    return Markup(get_plotlyjs().replace("</script", "<\\/script"))


def _ours(setting: Latency) -> EngineTime | None:
    return next((r for r in setting.rows if r.engine == OURS and r.median), None)


def _tiles(results: Results) -> Iterator[Tile]:
    for metric in results.quality[:1]:
        if metric.dense is None or metric.sparse is None:
            continue
        name = metric.name[:1].upper() + metric.name[1:]
        if metric.unit == "fraction":
            detail = f"dense {wording.percent(metric.dense, 2)}, "
            detail += wording.points(metric.sparse - metric.dense)
            yield Tile(f"{name}, sparse", wording.percent(metric.sparse, 2), detail)
        else:
            detail = f"dense {wording.number(metric.dense)}"
            yield Tile(f"{name}, sparse", wording.number(metric.sparse), detail)
    size = results.size
    if size.sparsity is not None:
        kept, total = size.prunable_nonzero, size.prunable
        if kept is None or total is None:
            kept, total = size.nonzero, size.parameters
        detail = f"{wording.count(kept)} of {wording.count(total)} weights kept"
        yield Tile("Zeros", wording.percent(size.sparsity), detail)
    if size.dense_bytes and size.sparse_bytes:
        detail = f"{wording.size(size.dense_bytes)} → {wording.size(size.sparse_bytes)}"
        yield Tile("File", wording.smaller(size.dense_bytes / size.sparse_bytes), detail)
    for setting in results.latency[:1]:
        yield from _speed_tiles(setting)


def _speed_tiles(setting: Latency) -> Iterator[Tile]:
    ours = _ours(setting)
    eager = next(
        (r for r in setting.rows if r.engine == EAGER and r.weights == "dense" and r.median), None
    )
    where = wording.threads(setting.threads)
    if setting.batch is not None:
        where = f"batch {setting.batch}, {where}"
    seen = {EAGER: eager, "fastest dense": setting.fastest("dense", skip=OURS)}
    for title, other in seen.items():
        if ours is None or other is None:
            continue
        times = times_faster(ours, other)
        if times and math.isfinite(times):
            name = "eager PyTorch" if title == EAGER else f"fastest dense, {other.engine}"
            detail = f"{wording.seconds(other.median)} → {wording.seconds(ours.median)}, {where}"
            yield Tile(f"vs {name}", wording.speed(times), detail, accent=times > 1.02)


def _latency_panel(setting: Latency, position: int) -> Panel:
    rows = [
        [
            r.engine,
            r.weights,
            wording.seconds(r.median),
            f"{wording.seconds(r.low)} – {wording.seconds(r.high)}" if r.low and r.high else "–",
            wording.ratio(r.ratio),
            wording.DASH if r.max_error is None else f"{r.max_error:.0e}",
        ]
        for r in setting.rows
        if r.median
    ]
    head = ["engine", "weights", "median", "quartiles", "speed", "output error"]
    caption = f"Medians of {setting.rounds} rounds; speed relative to {setting.baseline}."
    missing = [f"{r.label}: {r.missing}" for r in setting.rows if r.missing]
    table = Table(caption, head, rows, [2, 3, 4, 5]) if rows else None
    return Panel(figures.latency(setting, position), table, missing)


def _outcome_panels(results: Results) -> Iterator[Panel]:
    if results.quality:
        rows = []
        for m in results.quality:
            fraction = m.unit == "fraction"
            values = [wording.percent(v, 2) if fraction else wording.number(v)
                      for v in (m.dense, m.sparse)]  # fmt: skip
            change = wording.DASH
            if m.dense is not None and m.sparse is not None:
                gap = m.sparse - m.dense
                change = wording.points(gap) if fraction else f"{gap:+.4g}".replace("-", "−")
            better = "higher" if m.higher_is_better else "lower"
            rows.append([m.name, *values, change, f"{better} is better", m.note])
        if not any(row[-1] for row in rows):
            rows = [row[:-1] for row in rows]
        head = ["figure", "dense", "sparse", "change", "", "note"][: len(rows[0])]
        table = Table("Both networks on the same held-out data.", head, rows, [1, 2, 3])
        yield Panel(figures.quality(results.quality), table)
    size = results.size
    numbers = [
        ("file, dense", wording.size(size.dense_bytes), size.dense_bytes),
        ("file, sparse", wording.size(size.sparse_bytes), size.sparse_bytes),
        ("numbers in all tensors", wording.count(size.parameters), size.parameters),
        ("of these not zero", wording.count(size.nonzero), size.nonzero),
        ("prunable weights", wording.count(size.prunable), size.prunable),
        ("of these not zero", wording.count(size.prunable_nonzero), size.prunable_nonzero),
    ]
    rows = [[name, text] for name, text, value in numbers if value is not None]
    if rows:
        table = Table("Files as aerogel.save wrote them.", ["", "amount"], rows, [1])
        yield Panel(figures.file_size(size), table)


def _layer_panels(results: Results) -> Iterator[Panel]:
    for figure in (figures.layer_sparsity(results.layers), figures.layer_time(results.layers)):
        if figure:
            yield Panel(figure, None)


def _layer_table(results: Results) -> Table | None:
    if not results.layers:
        return None
    rows = [
        [
            layer.name,
            layer.type,
            layer.shape,
            wording.percent(layer.sparsity),
            layer.pattern,
            layer.kernel,
            wording.seconds(layer.seconds_dense),
            wording.seconds(layer.seconds_sparse),
            wording.percent(layer.share),
        ]
        for layer in results.layers
    ]
    head = ["layer", "type", "weight", "zeros", "pattern", "kernel", "dense", "sparse", "share"]
    return Table(
        "Dense and sparse: the best kernel of each kind, timed alone. Share: of the compiled "
        "network's time.",
        head, rows, [3, 6, 7, 8],
    )  # fmt: skip


def _machine(results: Results) -> list[tuple[str, str]]:
    hardware, subject = results.hardware, results.subject
    cores = [
        f"{hardware.physical_cores} cores" if hardware.physical_cores else "",
        f"{hardware.logical_cores} hardware threads" if hardware.logical_cores else "",
    ]
    facts = [
        ("Network", subject.model),
        ("Data", subject.data),
        ("Data source", subject.data_source),
        ("Data licence", subject.data_license),
        ("Examples", _examples(subject.train_examples, subject.test_examples)),
        ("Method", subject.method),
        ("Pattern", subject.pattern),
        ("Seed", "" if subject.seed is None else str(subject.seed)),
        ("Processor", hardware.cpu),
        ("Cores", ", ".join(filter(None, cores))),
        ("Instruction sets", " ".join(hardware.isa)),
        ("aerogel kernels", hardware.kernels),
        ("Memory", "" if hardware.ram_bytes is None else wording.memory(hardware.ram_bytes)),
        ("System", hardware.os),
        ("Python", hardware.python),
        *((name, version) for name, version in results.versions.items()),
    ]
    return [(name, value) for name, value in facts if value]


def _examples(train: int | None, test: int | None) -> str:
    if train is None and test is None:
        return ""
    return f"{wording.count(train)} to train, {wording.count(test)} to test"
