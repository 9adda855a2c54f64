"""Small plots as SVG: lines over axes, readable in light and dark pages alike."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 30, 44
COLORS = ("#2a78d6", "#d1495b", "#3b8f5e", "#8d5bb5", "#d98a1f", "#2b9aa0", "#b0568f", "#7a7f2a",
          "#5f6f8f", "#9c5a3c", "#57b894", "#c94f9a")  # fmt: skip
INK, FAINT = "#6b7280", "#9ca3af"
_LABEL_HEIGHT = 15

Panel = Mapping[str, Any]


def svg(panels: Sequence[Panel]) -> str:
    """Panels side by side.

    Args:
        panels: Each with "title", "x" and "y" (axis labels) and "lines": name -> points (x, y).
            Axes are logarithmic, for positive numbers; a line of slope one through the last point
            of each line shows what linear growth is. With "linear": True axes are linear from 0,
            names stand below all panels, and "level" (name, y) is a horizontal line to compare
            with.
    """
    width, names = WIDTH * len(panels), _names(panels)
    rows = -(-len(names) // (_NAMES_A_ROW * len(panels)))
    height = HEIGHT + _LABEL_HEIGHT * rows
    drawn = [
        f'<g transform="translate({i * WIDTH} 0)">{_panel(panel, names)}</g>'
        for i, panel in enumerate(panels)
    ]
    drawn.append(_legend(names, width))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="11" '
        f'fill="{INK}">{"".join(drawn)}</svg>\n'
    )


_NAMES_A_ROW = 3  # for each panel


def _names(panels: Sequence[Panel]) -> list[str]:
    """Of the lines of linear panels, in order; the same name has the same colour in all."""
    return list(dict.fromkeys(n for p in panels if p.get("linear") for n in p["lines"]))


def _legend(names: Sequence[str], width: int) -> str:
    a_row = max(1, width // WIDTH) * _NAMES_A_ROW
    parts = []
    for i, name in enumerate(names):
        x = LEFT / 2 + (i % a_row) * (width - LEFT / 2) / a_row
        y = HEIGHT + 8 + _LABEL_HEIGHT * (i // a_row)
        parts.append(f'<circle cx="{x:.1f}" cy="{y - 4:.1f}" r="3.5" fill="{_color(i)}"/>')
        parts.append(_text(x + 8, y, name, "start", color=_color(i)))
    return "".join(parts)


def _color(position: int) -> str:
    return COLORS[position % len(COLORS)]


class _Linear:
    """A linear scale from 0 to the largest value, onto pixels."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self.high, self.begin, self.end = 1.02 * max(values), begin, end

    def __call__(self, value: float) -> float:
        return self.begin + value / self.high * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Four to ten round numbers."""
        power = 10.0 ** math.floor(math.log10(self.high))
        step = next(s * power for s in (0.1, 0.2, 0.25, 0.5, 1, 2) if self.high / (s * power) <= 8)
        return [i * step for i in range(int(self.high / step) + 1)]


class _Axis:
    """A logarithmic scale from the least to the largest value, onto pixels."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            self.low, self.high = self.low / 2, self.high * 2
        self.begin, self.end = begin, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        """Powers of ten, with twos and fives where those are few."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        inside = [
            [m * 10.0**e for e in exponents for m in steps if self.low <= m * 10.0**e <= self.high]
            for steps in ((1,), (1, 2, 5))
        ]
        return inside[0] if len(inside[0]) >= 3 else inside[1]


def _panel(panel: Panel, names: Sequence[str]) -> str:
    linear = bool(panel.get("linear"))
    points = [point for line in panel["lines"].values() for point in line]
    axis = _Linear if linear else _Axis
    x = axis([p[0] for p in points], LEFT, WIDTH - RIGHT)
    y = axis([p[1] for p in points], HEIGHT - BOTTOM, TOP)
    parts = [_text(LEFT, TOP - 14, panel["title"], "start", bold=True)]
    for tick in x.ticks():
        parts.append(_line(x(tick), TOP, x(tick), HEIGHT - BOTTOM))
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 14, _number(tick), "middle"))
    for tick in y.ticks():
        parts.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick)))
        parts.append(_text(LEFT - 6, y(tick) + 4, _number(tick), "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, panel["x"], "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<g transform="rotate(-90 14 {middle:.0f})">'
                 f"{_text(14, middle + 4, panel['y'], 'middle')}</g>")  # fmt: skip
    if panel.get("level"):
        name, level = panel["level"]
        parts.append(_line(LEFT, y(level), WIDTH - RIGHT, y(level), dashed=True))
        parts.append(_text(WIDTH - RIGHT, y(level) + 13, name, "end"))
    for i, (name, line) in enumerate(panel["lines"].items()):
        if isinstance(x, _Linear):
            parts += _series(line, x, y, _color(names.index(name)))
        else:
            label = _text(LEFT + 8, TOP + 14 + _LABEL_HEIGHT * i, name, "start", color=_color(i))
            parts += [_guide(line, x, y), *_series(line, x, y, _color(i)), label]
    return "".join(parts)


def _guide(points: Sequence[Sequence[float]], x: _Axis, y: _Axis) -> str:
    """The line of slope one through the last point, from where it enters the plot."""
    last_x, last_y = points[-1]
    first_x = max(x.low, last_x * y.low / last_y)
    return _line(x(first_x), y(last_y * first_x / last_x), x(last_x), y(last_y), dashed=True)


Scale = _Axis | _Linear


def _series(points: Sequence[Sequence[float]], x: Scale, y: Scale, color: str) -> list[str]:
    path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)
    line = f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>'
    dots = [f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="2.6" fill="{color}"/>'
            for px, py in points]  # fmt: skip
    return [line, *dots]


def _line(x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False) -> str:
    style = ' stroke-dasharray="3 3"' if dashed else ' stroke-opacity="0.3"'
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{FAINT}"{style}/>'
    )


def _text(
    x: float, y: float, text: str, anchor: str, *, bold: bool = False, color: str = INK
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"{weight}>'
        f"{html.escape(text)}</text>"
    )


def _number(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"
