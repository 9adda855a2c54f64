"""`aerogel info`: what this machine is, and what aerogel found on it."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

import typer

from aerogel.cli import terminal

# Distribution names of what takes part in results, the optional engines last.
PACKAGES = (
    "torch",
    "numpy",
    "accelerate",
    "safetensors",
    "transformers",
    "onnx",
    "onnxruntime",
    "openvino",
)


def info(
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Also measure arithmetic and memory peaks (seconds).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Show hardware, instruction sets, threads, engines and folders.

    Example: `aerogel info --roofline --json`
    """
    with terminal.guarded():
        facts = gather(roofline=roofline)
        if as_json:
            terminal.print_json(facts)
        else:
            _show(facts)


def gather(*, roofline: bool = False) -> dict[str, Any]:
    """Everything `aerogel info` says, as JSON values.

    Args:
        roofline: Measure the machine's peaks too.
    """
    import torch

    import aerogel
    from aerogel import bench, data, kernels

    native = kernels.native_available()
    facts: dict[str, Any] = {
        "aerogel": aerogel.__version__,
        "hardware": _plain(bench.hardware_info()),
        "threads": torch.get_num_threads(),
        "kernels": {
            "isa": kernels.isa() if native else None,
            "available": kernels.available_isas() if native else [],
            "native": native,
            "reference_mode": kernels.reference_mode(),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "cache": str(data.cache_root()),
    }
    if roofline:
        counts = sorted({1, torch.get_num_threads()})
        facts["roofline"] = {str(n): _plain(kernels.roofline(n)) for n in counts}
    return facts


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value._asdict() if hasattr(value, "_asdict") else value


def _show(facts: dict[str, Any]) -> None:
    console = terminal.stdout()
    for name, value in _flat(facts):
        text = "not installed" if value is None else str(value)
        console.print(f"[cyan]{name:<28}[/] {text}", highlight=False, soft_wrap=True)


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rows.append((prefix + key, ", ".join(map(str, value))))
        else:
            rows.append((prefix + key, f"{value:.4g}" if isinstance(value, float) else value))
    return rows
