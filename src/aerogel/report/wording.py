"""Numbers as a reader wants them; a missing one is a dash."""

from __future__ import annotations

import itertools

DASH = "–"
TIMES = "×"


def seconds(value: float | None) -> str:
    """A time: three digits in µs, ms or s; minutes above two of them."""
    if value is None:
        return DASH
    if value >= 120:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{_digits(value * factor)} {unit}"
    return f"{_digits(value)} s"


def size(value: float | None) -> str:
    """Bytes in decimal units, as disks are sold."""
    if value is None:
        return DASH
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{_digits(value)} {unit}"


def memory(value: float | None) -> str:
    """Bytes of main memory, in binary gigabytes."""
    return DASH if value is None else f"{value / 2**30:.0f} GiB"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent."""
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def count(value: float | None) -> str:
    """A whole number with thousands apart."""
    return DASH if value is None else f"{value:,.0f}"


def number(value: float | None) -> str:
    """A plain figure."""
    return DASH if value is None else f"{value:.4g}"


def points(difference: float) -> str:
    """A difference of fractions in percentage points, with its sign."""
    text = f"{100 * difference:+.2f}".replace("-", "−")
    return f"{text} points"


def ratio(value: float | None) -> str:
    """How many times as fast or as small."""
    return DASH if value is None else f"{_digits(value)}{TIMES}"


def speed(value: float) -> str:
    """A ratio of times in words; below one it is called slower, not 0.6 times faster."""
    if 0.98 <= value <= 1.02:
        return "equally fast"
    return f"{ratio(value)} faster" if value > 1 else f"{ratio(1 / value)} slower"


def smaller(value: float) -> str:
    """A ratio of sizes in words."""
    return f"{ratio(value)} smaller" if value >= 1 else f"{ratio(1 / value)} larger"


def threads(value: int) -> str:
    """A thread count."""
    return f"{value} thread{'s' * (value != 1)}"


def clipped(text: str, limit: int = 34) -> str:
    """A long name without its middle: the ends tell layers apart."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return f"{text[: limit - 1 - tail]}…{text[-tail:]}"


def within_parent(names: list[str]) -> list[str]:
    """Dotted names without the parents that all of them share."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, levels)))
    return [".".join(name.split(".")[shared:]) for name in names]


def _digits(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
