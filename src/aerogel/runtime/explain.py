"""What the compiler did and why, as a table for people and as JSON for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        layer: Module path.
        op: "conv2d" or "linear".
        shape: Of the weight.
        sparsity: Fraction of zeros.
        pattern: "dense", "unstructured", "2x1", "4x1" or "N:M".
        kernel: What runs it.
        seconds_sparse: Fastest kernel that skips zeros, on the example; None if there is none.
        seconds_dense: Dense torch on the example.
        share: Fraction of the compiled model's time spent in this layer.
        bound: What limits the kernel on this machine, "FMA", "loads" or "bytes"; None if that
            could not be measured.
        reach: Fraction of that limit's speed that the kernel has; above 1 where the data is in a
            nearer cache than the limit supposes.
    """

    layer: str
    op: str
    shape: tuple[int, ...]
    sparsity: float
    pattern: str
    kernel: str
    seconds_sparse: float | None
    seconds_dense: float
    share: float
    bound: str | None = None
    reach: float | None = None


@dataclass(frozen=True)
class Explanation:
    """The compiled model, layer by layer.

    Attributes:
        rows: Layers in the order of execution.
        strategies: Seconds of each whole-model contender on the example.
        chosen: The fastest of them, which the compiled model runs.
        threads: Threads it was measured with.
        isa: Instruction set of the kernels.
        inputs: The example, in words.
        notes: Fallbacks, rejected contenders, warnings.
    """

    rows: list[LayerRow]
    strategies: dict[str, float]
    chosen: str
    threads: int
    isa: str
    inputs: str
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """One call of the compiled model on the example."""
        return self.strategies[self.chosen]

    @property
    def speedup(self) -> float:
        """Over the original model in eager torch, as measured at compile time."""
        return self.strategies["eager torch"] / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings."""
        return {**asdict(self), "rows": [{**asdict(r), "shape": list(r.shape)} for r in self.rows]}

    def __str__(self) -> str:
        head = ("layer", "op", "weight", "zeros", "pattern", "kernel", "sparse", "dense", "share",
                "bound")  # fmt: skip
        table = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        lines = [_align(line, widths) for line in table]
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join([*lines, "", *self._summary(), *(f"note: {n}" for n in self.notes)])

    def _summary(self) -> list[str]:
        order = sorted(self.strategies, key=lambda name: self.strategies[name])
        timed = ", ".join(f"{name} {_time(self.strategies[name])}" for name in order)
        return [
            f"runs as: {self.chosen}, {self.speedup:.2f}x eager torch "
            f"({self.threads} thread{'s' * (self.threads != 1)}, {self.isa}, inputs {self.inputs})",
            f"measured: {timed}",
        ]


_LEFT_ALIGNED = 6


def _align(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = [
        cell.ljust(width) if column < _LEFT_ALIGNED and column != 3 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _cells(row: LayerRow) -> tuple[str, ...]:
    return (
        row.layer,
        row.op,
        "x".join(str(size) for size in row.shape),
        f"{100 * row.sparsity:.0f}%",
        row.pattern,
        row.kernel,
        "-" if row.seconds_sparse is None else _time(row.seconds_sparse),
        _time(row.seconds_dense),
        f"{100 * row.share:.1f}%",
        "-" if row.reach is None else f"{row.bound} {100 * row.reach:.0f}%",
    )


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"
