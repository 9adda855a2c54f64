"""Fair comparisons: what runs a network how fast here, on which machine, at what size.

table = bench.compare(bench.lineup(dense, sparse), example, threads=1)
print(table)                                  # table.to_dict() goes into results.json
"""

from __future__ import annotations

from aerogel.bench.compare import Contender, compare, lineup
from aerogel.bench.engines import (
    DENSE_ENGINES,
    ENGINES,
    Aerogel,
    Engine,
    Inputs,
    NotApplicable,
    OnnxRuntime,
    OpenVino,
    TorchChannelsLast,
    TorchCompile,
    TorchEager,
    Workspace,
)
from aerogel.bench.hardware import Hardware, hardware_info, package_versions
from aerogel.bench.sizes import FileSize, file_sizes
from aerogel.bench.table import BenchRow, BenchTable, format_seconds

__all__ = [
    "DENSE_ENGINES",
    "ENGINES",
    "Aerogel",
    "BenchRow",
    "BenchTable",
    "Contender",
    "Engine",
    "FileSize",
    "Hardware",
    "Inputs",
    "NotApplicable",
    "OnnxRuntime",
    "OpenVino",
    "TorchChannelsLast",
    "TorchCompile",
    "TorchEager",
    "Workspace",
    "compare",
    "file_sizes",
    "format_seconds",
    "hardware_info",
    "lineup",
    "package_versions",
]
