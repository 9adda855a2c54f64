"""From the stages' markers to `results.json`: the report's only input."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from aerogel import bench, data, report, runtime
from aerogel.compress.recipe import Recipe
from aerogel.compress.workdir import Marker
from aerogel.pruning import METHODS, RewritingMethod

# Losses have no unit and fall; every other score of `train.evaluate` is a fraction that rises.
_LOSS = "loss"


def assemble(
    recipe: Recipe,
    folder: Path,
    about_data: dict[str, Any],
    markers: dict[str, Marker],
    command: str,
) -> report.Results:
    """Put together what a run found out.

    Args:
        recipe: What was done.
        folder: Where its files are.
        about_data: `data_facts` of the data set.
        markers: The finished stages by name, in their order.
        command: The command line.
    """
    found = {name: marker.result for name, marker in markers.items()}
    timings = [result for name, result in found.items() if name.startswith("measure-")]
    hardware = bench.hardware_info().to_dict()
    versions = hardware.pop("versions")
    method = METHODS[recipe.method]
    saved = method.saves if isinstance(method, RewritingMethod) else "zeros"
    aim = f"{100 * recipe.sparsity:g} % {saved} ({recipe.pattern})"
    return report.Results.model_validate(
        {
            "title": f"{recipe.model.name} on {about_data['data']}, {aim}",
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "recipe": recipe.to_yaml(),
            "subject": _subject(recipe, about_data, found["dense"]["parameters"]),
            "quality": _quality(found["evaluate"]["quality"]),
            "size": _size(folder, found["prune"]["pruned"]),
            "latency": [timing["latency"] for timing in timings],
            "layers": timings[0]["layers"] if timings else [],
            "curves": found["dense"]["curves"] + found["prune"]["curves"],
            "stages": [{"name": n, "seconds": m.seconds} for n, m in markers.items()],
            "hardware": hardware,
            "versions": versions,
            "notes": _notes(found, timings),
        }
    )


def data_facts(dataset: data.Dataset) -> dict[str, Any]:
    """What the report says about the data, as JSON values."""
    return {
        "data": dataset.name,
        "data_source": dataset.source,
        "data_license": dataset.license,
        "train_examples": len(dataset.train),
        "test_examples": len(dataset.test),
    }


def _subject(recipe: Recipe, about_data: dict[str, Any], parameters: int) -> dict[str, Any]:
    return {
        "model": recipe.model.name,
        "parameters": parameters,
        **about_data,
        "method": recipe.method,
        "pattern": recipe.pattern,
        "target_sparsity": recipe.sparsity,
        "seed": recipe.seed,
    }


def _quality(scores: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "dense": dense,
            "sparse": scores["sparse"][name],
            "unit": "plain" if name == _LOSS else "fraction",
            "higher_is_better": name != _LOSS,
        }
        for name, dense in scores["dense"].items()
    ]


def _size(folder: Path, pruned: dict[str, list[int]]) -> dict[str, int]:
    dense = runtime.inspect(folder / "dense.safetensors")
    sparse = runtime.inspect(folder / "model.safetensors")
    nonzero = sum(round(t.elements * (1 - (t.sparsity or 0.0))) for t in sparse.tensors)
    return {
        "dense_bytes": dense.file_bytes,
        "sparse_bytes": sparse.file_bytes,
        "parameters": sum(t.elements for t in dense.tensors),
        "nonzero": nonzero,
        "prunable": sum(total for total, _ in pruned.values()),
        "prunable_nonzero": sum(kept for _, kept in pruned.values()),
    }


def _notes(found: dict[str, Any], timings: list[dict[str, Any]]) -> list[str]:
    notes = [
        "Files: both networks whole, in float32 safetensors; the dense one with every weight "
        "written out, the sparse one with its zeros as bits."
    ]
    for stage in ("dense", "prune"):
        notes += found[stage].get("notes", [])
    errors = [timing["max_error"] for timing in timings if "max_error" in timing]
    if errors:
        notes.append(
            f"The compiled network's outputs differ from eager torch's by at most "
            f"{max(errors):.1e} of the largest output."
        )
    return notes + list(dict.fromkeys(note for timing in timings for note in timing["notes"]))
