"""Fair comparisons: what runs a network how fast here, on which machine, at what size.

table = bench.compare(bench.lineup(dense, sparse), example, threads=1)
print(table)                                  # table.to_dict() goes into results.json
"""

from __future__ import annotations

from aerogel.bench.compare import compare
from aerogel.bench.engines import (
    Aerogel,
    Engine,
    TorchChannelsLast,
    TorchCompile,
    TorchEager,
    Workspace,
)
from aerogel.bench.field import (
    DENSE_ENGINES,
    ENGINES,
    SPARSE_ENGINES,
    Contender,
    Source,
    find_engine,
    lineup,
)
from aerogel.bench.hardware import Hardware, hardware_info, package_versions
from aerogel.bench.inputs import Inputs, NotApplicable
from aerogel.bench.onnx_engines import DeepSparse, OnnxRuntime, OpenVino
from aerogel.bench.processes import WorkerLost, Workers
from aerogel.bench.sizes import FileSize, file_sizes
from aerogel.bench.table import BenchRow, BenchTable, format_seconds

__all__ = [
    "DENSE_ENGINES",
    "ENGINES",
    "SPARSE_ENGINES",
    "Aerogel",
    "BenchRow",
    "BenchTable",
    "Contender",
    "DeepSparse",
    "Engine",
    "FileSize",
    "Hardware",
    "Inputs",
    "NotApplicable",
    "OnnxRuntime",
    "OpenVino",
    "Source",
    "TorchChannelsLast",
    "TorchCompile",
    "TorchEager",
    "WorkerLost",
    "Workers",
    "Workspace",
    "compare",
    "file_sizes",
    "find_engine",
    "format_seconds",
    "hardware_info",
    "lineup",
    "package_versions",
]
