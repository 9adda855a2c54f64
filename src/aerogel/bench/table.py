"""The outcome of a comparison, for a terminal and for `results.json`."""

from __future__ import annotations

import io
import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass
class BenchRow:
    """One contender; times are seconds a call, None where it could not run.

    Attributes:
        label: What the table calls it.
        engine: Which engine ran.
        weights: Whether it was given the dense or the sparse network.
        median: Over rounds; `low` and `high` are the quartiles.
        ratio: Baseline's time over this one's, the median of per-round ratios, with quartiles.
        max_error: Largest output error relative to eager torch's largest output.
        missing: Why there is no time.
        cpu: Cores that were busy with it: the process's CPU time over wall time.
        samples: The time of each round.
        facts: What the engine says about the network, as JSON values.
    """

    label: str
    engine: str
    weights: Literal["dense", "sparse"] = "dense"
    median: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    max_error: float | None = None
    missing: str | None = None
    cpu: float | None = None
    samples: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class BenchTable:
    """All contenders of one comparison.

    Attributes:
        threads: Every engine's.
        batch: Of the example inputs.
        rounds: Samples of each contender.
        baseline: Label of the row that ratios refer to.
        rows: In the order given.
    """

    threads: int
    batch: int | None
    rounds: int
    baseline: str
    rows: list[BenchRow]

    def row(self, label: str) -> BenchRow:
        """The row of that label.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if row.label == label:
                return row
        raise ValueError(f"label={label!r} is not one of {', '.join(r.label for r in self.rows)}")

    def ratio(self, slow: str, fast: str) -> float:
        """How many times faster `fast` is than `slow`: the median of the rounds' own ratios.

        Raises:
            ValueError: one of them is not in the table, or could not run.
        """
        a, b = self.row(slow), self.row(fast)
        for row in (a, b):
            if not row.samples:
                raise ValueError(f"{row.label} has no times: {row.missing}")
        return statistics.median(x / y for x, y in zip(a.samples, b.samples, strict=True))

    def fastest(self, weights: str | None = None, *, skip: str = "") -> BenchRow | None:
        """The quickest row, among those of `weights`, and not of the engine `skip`."""
        rows = [
            r for r in self.rows
            if r.median is not None and weights in (None, r.weights) and r.engine != skip
        ]  # fmt: skip
        return min(rows, key=lambda r: r.median or 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as `report.Latency` reads them; an error that is no number is None."""
        plain = asdict(self)
        for row in plain["rows"]:
            if row["max_error"] is not None and not math.isfinite(row["max_error"]):
                row["max_error"] = None
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BenchTable:
        """The table of a `to_dict()`."""
        return cls(**{**values, "rows": [BenchRow(**row) for row in values["rows"]]})

    def __rich__(self) -> Table:
        batch = "" if self.batch is None else f", batch {self.batch}"
        title = f"{_count(self.threads, 'thread')}{batch}, medians of {self.rounds} rounds"
        table = Table(title=title, title_justify="left", header_style="bold", box=None)
        for name, justify in zip(
            ("engine", "weights", "time", "quartiles", "speed", "error"),
            ("left", "left", "right", "right", "right", "right"),
            strict=True,
        ):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        best = self.fastest()
        for row in self.rows:
            if row.median is not None:
                table.add_row(*_cells(row), style="bold green" if row is best else None)
        said = [f"speed relative to {escape(self.baseline)}"] if self.baseline else []
        # Escaped, because a reason may quote code with square brackets, which rich would eat.
        said += [
            f"not run: {escape(row.label)}: {escape(row.missing or 'not measured')}"
            for row in self.rows
            if row.median is None
        ]
        table.caption, table.caption_justify = "\n".join(said), "left"
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110, force_terminal=False, color_system=None).print(self)
        return text.getvalue().rstrip()


def format_seconds(seconds: float) -> str:
    """Three significant digits in the unit that reads best."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".removesuffix(".") if 0.001 <= value < 999.5 else f"{value:.0f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _cells(row: BenchRow) -> tuple[str, ...]:
    assert row.median is not None
    low, high = row.low or row.median, row.high or row.median
    return (
        escape(row.engine),
        row.weights,
        format_seconds(row.median),
        f"{format_seconds(low)} - {format_seconds(high)}",
        "-" if row.ratio is None else f"{row.ratio:.2f}x",
        "-" if row.max_error is None else f"{row.max_error:.0e}",
    )
