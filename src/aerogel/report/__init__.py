"""The page a person looks at: one self-contained HTML file made from `results.json`."""

from __future__ import annotations

from aerogel.report.page import render
from aerogel.report.schema import (
    Curve,
    EngineTime,
    Hardware,
    Latency,
    Layer,
    Metric,
    Results,
    Size,
    Stage,
    Subject,
    times_faster,
)

__all__ = [
    "Curve",
    "EngineTime",
    "Hardware",
    "Latency",
    "Layer",
    "Metric",
    "Results",
    "Size",
    "Stage",
    "Subject",
    "render",
    "times_faster",
]
