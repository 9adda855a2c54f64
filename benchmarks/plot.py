"""Small plots as SVG: lines over logarithmic axes, readable in light and dark pages alike."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 30, 44
COLORS = ("#2a78d6", "#d1495b", "#3b8f5e", "#8d5bb5")
INK, FAINT = "#6b7280", "#9ca3af"
_LABEL_HEIGHT = 15

Panel = Mapping[str, Any]


def svg(panels: Sequence[Panel]) -> str:
    """Panels side by side.

    Args:
        panels: Each with "title", "x" and "y" (axis labels) and "lines": name -> points (x, y),
            all positive. Points are measurements; a line of slope one through the last point of
            each shows what linear growth is.
    """
    width = WIDTH * len(panels)
    drawn = [
        f'<g transform="translate({i * WIDTH} 0)">{_panel(panel)}</g>'
        for i, panel in enumerate(panels)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" '
        f'viewBox="0 0 {width} {HEIGHT}" font-family="system-ui, sans-serif" font-size="11" '
        f'fill="{INK}">{"".join(drawn)}</svg>\n'
    )


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


def _panel(panel: Panel) -> str:
    points = [point for line in panel["lines"].values() for point in line]
    x = _Axis([p[0] for p in points], LEFT, WIDTH - RIGHT)
    y = _Axis([p[1] for p in points], HEIGHT - BOTTOM, TOP)
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
    for i, (name, line) in enumerate(panel["lines"].items()):
        parts += _series(name, line, x, y, COLORS[i % len(COLORS)], i)
    return "".join(parts)


def _series(
    name: str, points: Sequence[Sequence[float]], x: _Axis, y: _Axis, color: str, position: int
) -> list[str]:
    last_x, last_y = points[-1]
    # The line of slope one, from where it enters the plot.
    first_x = max(x.low, last_x * y.low / last_y)
    guide = _line(x(first_x), y(last_y * first_x / last_x), x(last_x), y(last_y), dashed=True)
    path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)
    line = f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>'
    dots = [f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="2.6" fill="{color}"/>'
            for px, py in points]  # fmt: skip
    label = _text(LEFT + 8, TOP + 14 + _LABEL_HEIGHT * position, name, "start", color=color)
    return [guide, line, *dots, label]


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
