"""Results as a run would write them, for tests of the page."""

from __future__ import annotations

import math
from typing import Any

_ENGINES = {
    "torch eager": 14.2e-3,
    "torch channels_last": 12.9e-3,
    "torch.compile": 9.1e-3,
    "onnxruntime": 6.4e-3,
    "openvino": 5.8e-3,
}


def row(engine: str, weights: str, median: float, baseline: float) -> dict[str, Any]:
    samples = [median * factor for factor in (1.0, 0.97, 1.04)]
    return {
        "label": f"{engine} ({weights})", "engine": engine, "weights": weights, "median": median,
        "low": median * 0.97, "high": median * 1.04, "ratio": baseline / median,
        "ratio_low": baseline / median * 0.95, "ratio_high": baseline / median * 1.05,
        "samples": samples, "max_error": 2e-7, "missing": None,
    }  # fmt: skip


def latency(threads: int, batch: int) -> dict[str, Any]:
    scale = batch / (1 + 0.7 * (threads - 1))
    times = {name: time * scale for name, time in _ENGINES.items()}
    base = times["torch eager"]
    rows = [row(name, "dense", time, base) for name, time in times.items()]
    rows.append(row("torch eager", "sparse", base * 0.99, base))
    rows.append(row("aerogel", "sparse", 2.05e-3 * scale, base))
    rows[2] = {"label": "torch.compile (dense)", "engine": "torch.compile", "weights": "dense",
               "missing": "no C++ compiler is installed"}  # fmt: skip
    return {"threads": threads, "batch": batch, "rounds": 20, "rows": rows,
            "baseline": "torch eager (dense)"}  # fmt: skip


def layers() -> list[dict[str, Any]]:
    rows = [{"layer": "features.0.conv", "op": "conv2d", "shape": [32, 3, 3, 3], "sparsity": 0.0,
             "pattern": "dense", "kernel": "torch", "seconds_sparse": None,
             "seconds_dense": 310e-6, "share": 0.12}]  # fmt: skip
    for i in range(1, 14):
        rows.append({
            "layer": f"features.{i}.pointwise.convolution", "op": "conv2d",
            "shape": [64 * i, 64 * i, 1, 1], "sparsity": 0.86 + 0.01 * (i % 10),
            "pattern": "unstructured", "kernel": "spmm 4 rows",
            "seconds_sparse": (60 + 9 * i) * 1e-6, "seconds_dense": (300 + 55 * i) * 1e-6,
            "share": 0.04,
        })  # fmt: skip
    return rows


def curves() -> list[dict[str, Any]]:
    steps = list(range(0, 2000, 20))
    made = []
    for stage, start in (("dense", 2.3), ("prune", 0.5)):
        zeros = [
            0.0 if stage == "dense" else 0.9 * (1 - (1 - min(1, s / 1400)) ** 3) for s in steps
        ]
        loss = [0.2 + start * math.exp(-s / 400) + 0.05 * math.sin(s) for s in steps]
        accuracy = [0.93 - 0.4 * math.exp(-s / 300) for s in steps[::10]]
        made += [
            {"name": "loss", "stage": stage, "steps": steps, "values": loss},
            {"name": "sparsity", "stage": stage, "steps": steps, "values": zeros},
            {"name": "test accuracy", "stage": stage, "steps": steps[::10], "values": accuracy},
        ]
    return made


def results() -> dict[str, Any]:
    return {
        "schema_version": 1,
        "title": "mobilenet_v1 on fashion-mnist, 90 % zeros (unstructured)",
        "created": "2026-01-02T03:04:05+00:00",
        "command": "aerogel compress --model mobilenet_v1 --data fashion-mnist --sparsity 0.9",
        "recipe": "model:\n  name: mobilenet_v1\nsparsity: 0.9\n",
        "subject": {"model": "mobilenet_v1", "parameters": 3_217_226, "data": "fashion-mnist",
                    "method": "gradual-pruning", "pattern": "unstructured", "seed": 0,
                    "train_examples": 60_000, "test_examples": 10_000},
        "quality": [
            {"name": "accuracy", "dense": 0.9312, "sparse": 0.9287},
            {"name": "loss", "dense": 0.21, "sparse": 0.22, "unit": "plain",
             "higher_is_better": False},
        ],
        "size": {"dense_bytes": 12_950_000, "sparse_bytes": 1_840_000, "parameters": 3_217_226,
                 "nonzero": 341_000, "prunable": 3_139_584, "prunable_nonzero": 313_958},
        "latency": [latency(t, b) for b in (1, 32) for t in (1, 2)],
        "layers": layers(),
        "curves": curves(),
        "stages": [{"name": "dense", "seconds": 161.0}, {"name": "prune", "seconds": 140.2}],
        "hardware": {"cpu": "Example CPU", "physical_cores": 2, "logical_cores": 4,
                     "isa": ["avx2", "fma"], "ram_bytes": 25_000_000_000, "os": "Linux",
                     "python": "3.11.7", "kernels": "avx2"},
        "versions": {"aerogel": "0.1.0", "torch": "2.13.0"},
        "notes": ["The compiled network's outputs differ by at most 2.0e-07."],
    }  # fmt: skip
