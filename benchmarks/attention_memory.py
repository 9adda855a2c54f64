"""Time and memory of long prompts, up to 128k tokens, by sparse and by dense attention.

    python benchmarks/attention_memory.py [--json] [--save] [--check] [--work DIR]

What runs is `aerogel attention evaluate` on the small language model of experiments/tiny_lm.py (3
layers of 4 query and 2 key heads of 32), whose attention outweighs all else at these lengths:
MInference with 100 columns and 610 diagonals a head (a tenth of its default), found anew for each
prompt, in pieces of 8k tokens; up to 16k tokens whole, beside dense attention. Memory is the peak
of the process beyond the weights, the KV cache included. Dashed lines grow as the tokens do. A run
that was stopped goes on from what DIR holds.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from harness import Column, Figure, Findings, Setup

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments"))
import tiny_lm
from aerogel.data.source_text import load_source_text

LENGTHS = ("4k", "8k", "16k", "32k", "64k", "128k")
WHOLE_LENGTHS = LENGTHS[:3]  # dense attention takes minutes beyond
CHUNK = "8k"
SPARSE = "minference:ratio=0.1"
MEGA = 1e6

COLUMNS = (
    Column("method", "method"),
    Column("length", "tokens"),
    Column("density", "pairs kept", ".1%"),
    Column("prefill_seconds", "prefill s", ".2f"),
    Column("decode_ms", "a token, ms", ".2f"),
    Column("peak_mb", "extra memory MB", ".0f"),
    Column("cache_mb", "KV cache MB", ".1f"),
)


def evaluated(
    folder: Path, methods: str, lengths: Sequence[str], setup: Setup, *more: str
) -> list[dict[str, Any]]:
    """Rows of the command, in a process of its own."""
    tiny_lm.load()
    command = [
        *(sys.executable, "-m", "aerogel", "attention", "evaluate"),
        str(tiny_lm.folder_of(0, load_source_text())),
        *("--data", "python", "--methods", methods, "--lengths", ",".join(lengths)),
        *("--sequences", "0", "--probes", "0", "--rounds", "1", "--out", str(folder)),
        *("--threads", str(setup.threads), "--json", *more),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return list(json.loads(done.stdout))


def shown(row: dict[str, Any], name: str) -> dict[str, Any]:
    if row["missing"]:
        raise RuntimeError(f"{name} at {row['length']} tokens: {row['missing']}")
    return {
        "method": name,
        "length": row["length"],
        "density": row["density"],
        "prefill_seconds": row["prefill_seconds"],
        "decode_ms": 1e3 * row["decode_seconds"],
        "peak_mb": row["peak_bytes"] / MEGA,
        "cache_mb": row["cache_bytes"] / MEGA,
    }


def exponent(rows: list[dict[str, Any]], key: str) -> float:
    """Of the growth from a quarter of the longest prompt to the longest."""
    first, last = rows[-3], rows[-1]
    return math.log(last[key] / first[key]) / math.log(last["length"] / first["length"])


def panel(lines: dict[str, list[dict[str, Any]]], key: str, title: str, y: str) -> dict[str, Any]:
    points = {name: [(row["length"], row[key]) for row in rows] for name, rows in lines.items()}
    return {"title": title, "x": "tokens", "y": y, "lines": points}


def measure(setup: Setup) -> Findings:
    work = Path(setup.options.work)
    pieces = evaluated(work / "pieces", SPARSE, LENGTHS, setup, "--chunk", CHUNK)
    whole = evaluated(work / "whole", f"dense,{SPARSE}", WHOLE_LENGTHS, setup)
    names = {"dense": "dense", SPARSE: "minference"}
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in whole:
        lines.setdefault(names[row["method"]], []).append(shown(row, names[row["method"]]))
    in_pieces = f"minference, pieces of {CHUNK}"
    lines[in_pieces] = [shown(row, in_pieces) for row in pieces]
    sparse, dense = lines["minference"], lines["dense"]
    figures = [
        Figure(
            f"extra memory over tokens, {name}", exponent(lines[name], "peak_mb"), "exponent",
            most=1.1,
        )
        for name in ("minference", in_pieces)
    ]  # fmt: skip
    ratio = dense[-1]["prefill_seconds"] / sparse[-1]["prefill_seconds"]
    figures.append(
        Figure(f"minference, prompt of {WHOLE_LENGTHS[-1]}", ratio, "x dense, whole model")
    )
    plots = [
        panel(lines, "peak_mb", "Extra memory of a prompt", "MB"),
        panel(lines, "prefill_seconds", "Prefill", "seconds"),
    ]
    notes = [
        "One prompt for each row, by the wall clock: others' work on the machine is in the times.",
        "Exponents are of the last two doublings.",
    ]
    rows = [row for name in lines for row in lines[name]]
    return Findings(COLUMNS, rows, figures, notes, plots)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", default="runs/attention_memory", help="what is done so far")


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, measure, options=add_options))
