"""What machine a number was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# What decides the speed of matrix kernels; /proc/cpuinfo lists a hundred more.
_ISA_FLAGS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
_PACKAGES = ("aerogel", "torch", "numpy", "onnx", "onnxruntime", "openvino", "transformers")


@dataclass(frozen=True)
class Hardware:
    """The machine.

    Attributes:
        cpu: The processor's name.
        physical_cores: None where the system does not say.
        logical_cores: Hardware threads this process may use.
        isa: Instruction sets that matter to kernels.
        ram_bytes: Main memory.
        os: Operating system and architecture.
        python: Version of the interpreter.
        kernels: The instruction set aerogel's own kernels run on.
        versions: Installed packages that take part in a comparison.
    """

    cpu: str
    physical_cores: int | None
    logical_cores: int
    isa: list[str]
    ram_bytes: int | None
    os: str
    python: str
    kernels: str
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def hardware_info() -> Hardware:
    """Describe this machine, from the operating system and without measuring anything."""
    facts = _cpuinfo()
    return Hardware(
        cpu=_cpu_name(facts),
        physical_cores=_physical_cores(facts),
        logical_cores=_usable_threads(),
        isa=_instruction_sets(facts),
        ram_bytes=_memory(),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        kernels=_kernel_isa(),
        versions=package_versions(_PACKAGES),
    )


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpuinfo() -> list[dict[str, str]]:
    """The blocks of /proc/cpuinfo, one a hardware thread; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    blocks = []
    for block in text.strip().split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        blocks.append({key.strip(): value.strip() for key, _, value in pairs})
    return blocks


def _cpu_name(facts: list[dict[str, str]]) -> str:
    for key in ("model name", "Model", "Hardware"):
        if facts and facts[0].get(key):
            return re.sub(r"\s+", " ", facts[0][key])
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _physical_cores(facts: list[dict[str, str]]) -> int | None:
    cores = {(f.get("physical id"), f.get("core id")) for f in facts if "core id" in f}
    if cores:
        return len(cores)
    counted = _sysctl("hw.physicalcpu")
    return int(counted) if counted.isdigit() else None


def _usable_threads() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        return os.cpu_count() or 1


def _instruction_sets(facts: list[dict[str, str]]) -> list[str]:
    flags = set((facts[0].get("flags") or facts[0].get("Features") or "").split() if facts else ())
    if not flags and platform.machine().lower() in ("arm64", "aarch64"):
        flags = {"asimd"}
    return [flag for flag in _ISA_FLAGS if flag in flags]


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _sysctl(name: str) -> str:
    if platform.system() != "Darwin":
        return ""
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _kernel_isa() -> str:
    from aerogel import kernels

    return kernels.isa_in_use()
