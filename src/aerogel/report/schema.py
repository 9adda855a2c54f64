"""The shape of `results.json`: all that one compression run found out, the report's only input.

`aerogel compress` fills a `Results`; `aerogel.report.render` reads nothing else. Every part is
optional except the title, so a run that was cut short, or that skipped a stage, still has a report.
Times are seconds, sizes bytes, sparsity a fraction in [0, 1].
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

SCHEMA_VERSION = 1


class _Part(BaseModel):
    # A newer aerogel may add fields; an older one should still be able to draw the report.
    model_config = ConfigDict(extra="ignore")


class Subject(_Part):
    """What was compressed, on which data, and how."""

    model: str = ""
    parameters: int | None = Field(default=None, ge=0)
    data: str = ""
    data_source: str = ""
    data_license: str = ""
    train_examples: int | None = Field(default=None, ge=0)
    test_examples: int | None = Field(default=None, ge=0)
    method: str = ""
    pattern: str = ""
    target_sparsity: float | None = Field(default=None, ge=0, lt=1)
    seed: int | None = None


class Metric(_Part):
    """One quality figure of the dense and of the sparse network on the same held-out data.

    `unit="fraction"` values lie in [0, 1] and are shown in percent, differences in points.
    """

    name: str
    dense: float | None = None
    sparse: float | None = None
    unit: Literal["fraction", "plain"] = "fraction"
    higher_is_better: bool = True
    note: str = ""


class Size(_Part):
    """Bytes on disk and numbers of weights; `*_bytes` are whole files as `aerogel.save` wrote."""

    dense_bytes: int | None = Field(default=None, ge=0)
    sparse_bytes: int | None = Field(default=None, ge=0)
    parameters: int | None = Field(default=None, ge=0)
    nonzero: int | None = Field(default=None, ge=0)
    prunable: int | None = Field(default=None, ge=0)
    prunable_nonzero: int | None = Field(default=None, ge=0)

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros among the prunable weights, or among all where those are not known."""
        total, kept = self.prunable, self.prunable_nonzero
        if total is None or kept is None:
            total, kept = self.parameters, self.nonzero
        return 1 - kept / total if total and kept is not None else None


class EngineTime(_Part):
    """One bar: one engine running one set of weights. `missing` says why it could not run."""

    label: str
    engine: str
    weights: Literal["dense", "sparse"] = "dense"
    median: float | None = Field(default=None, gt=0)
    low: float | None = None  # first quartile
    high: float | None = None  # third quartile
    ratio: float | None = None  # median over rounds of (baseline's time / this one's time)
    ratio_low: float | None = None
    ratio_high: float | None = None
    samples: list[float] = Field(default_factory=list)  # seconds per call, one for each round
    max_error: float | None = None  # largest |difference| from torch eager / largest |output|
    missing: str | None = None
    cpu: float | None = None  # cores that were busy with it
    facts: dict[str, Any] = Field(default_factory=dict)  # what the engine says about the network


class Latency(_Part):
    """One comparison: every engine at one thread count and batch; `BenchTable.to_dict()`."""

    threads: int = Field(ge=1)
    batch: int | None = None
    rounds: int = Field(default=0, ge=0)
    baseline: str = ""
    rows: list[EngineTime] = Field(default_factory=list)

    def fastest(self, weights: str | None = None, *, skip: str = "") -> EngineTime | None:
        """The quickest row, among those of `weights`, and not of the engine `skip`."""
        rows = [
            r
            for r in self.rows
            if r.median and weights in (None, r.weights) and (not skip or r.engine != skip)
        ]
        return min(rows, key=lambda r: r.median or math.inf, default=None)


def times_faster(fast: EngineTime, slow: EngineTime) -> float | None:
    """Median of the rounds' own ratios where rounds are known, else the ratio of medians."""
    if len(fast.samples) == len(slow.samples) > 0:
        return statistics.median(b / a for a, b in zip(fast.samples, slow.samples, strict=True))
    if fast.ratio and slow.ratio == 1.0:
        return fast.ratio
    return slow.median / fast.median if fast.median and slow.median else None


class Layer(_Part):
    """One layer of the compiled network: a row of `CompiledModule.explain().to_dict()["rows"]`."""

    name: str = Field(validation_alias=AliasChoices("name", "layer"))
    type: str = Field(default="", validation_alias=AliasChoices("type", "op"))
    shape: str = ""
    sparsity: float | None = None
    pattern: str = ""
    kernel: str = ""
    seconds_sparse: float | None = None  # the best kernel that skips zeros; None: there is none
    seconds_dense: float | None = None  # dense torch on the same example
    share: float | None = None  # of the compiled model's time

    @field_validator("shape", mode="before")
    @classmethod
    def _shape_as_text(cls, value: Any) -> Any:
        return " × ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


class Curve(_Part):
    """One quantity over the optimizer steps of one stage, e.g. stage "prune", name "sparsity"."""

    name: str
    stage: str = ""
    steps: list[int] = Field(default_factory=list)
    values: list[float | None] = Field(default_factory=list)

    @model_validator(mode="after")
    def _same_length(self) -> Curve:
        if len(self.steps) != len(self.values):
            raise ValueError(
                f"curve {self.stage}/{self.name} has {len(self.steps)} steps "
                f"but {len(self.values)} values"
            )
        return self


class Stage(_Part):
    """A stage of the run and the wall time it took."""

    name: str
    seconds: float | None = None
    note: str = ""


class Hardware(_Part):
    """The machine; `bench.hardware_info()` fills it."""

    cpu: str = ""
    physical_cores: int | None = None
    logical_cores: int | None = None
    isa: list[str] = Field(default_factory=list)
    ram_bytes: int | None = None
    os: str = ""
    python: str = ""
    kernels: str = ""  # the instruction set aerogel's kernels run on


class Results(_Part):
    """One compression run from door to roof."""

    schema_version: int = SCHEMA_VERSION
    title: str
    created: str = ""  # ISO 8601
    command: str = ""
    recipe: str = ""  # the recipe's YAML text
    subject: Subject = Field(default_factory=Subject)
    quality: list[Metric] = Field(default_factory=list)
    size: Size = Field(default_factory=Size)
    latency: list[Latency] = Field(default_factory=list)
    layers: list[Layer] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    stages: list[Stage] = Field(default_factory=list)
    hardware: Hardware = Field(default_factory=Hardware)
    versions: dict[str, str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if not 1 <= value <= SCHEMA_VERSION:
            raise ValueError(
                f"schema_version is {value}, this aerogel reads 1 to {SCHEMA_VERSION}; "
                "install the aerogel that wrote the file, or a newer one"
            )
        return value

    @classmethod
    def from_file(cls, path: str | Path) -> Results:
        """Read `results.json`.

        Raises:
            ValueError: the file is not JSON, or not of this schema (pydantic says which field).
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"path={str(path)!r} is not a results.json: {error}") from error
        return cls.model_validate(raw)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinities become None, since JSON has no word for them."""
        cleaned = finite(self.model_dump(mode="json"))
        assert isinstance(cleaned, dict)
        return cleaned


def finite(value: Any) -> Any:
    """Plain values for JSON, which has no word for NaN and infinities: they become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
