"""What attention costs in a language model: time of prefill and decode, memory, density."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.attention import AttentionContext, Plan, Selector, select

DECODED = 16  # tokens


@dataclass
class Densities:
    """Kept share of the allowed pairs, of every call of a selector.

    Attributes:
        prefill, decode: (kept pairs, allowed pairs) of a head, one entry for each layer and call.
    """

    prefill: list[tuple[float, int]] = field(default_factory=list)
    decode: list[tuple[float, int]] = field(default_factory=list)


def kept_share(counts: Sequence[tuple[float, int]]) -> float | None:
    """Kept pairs of all calls divided by the allowed ones; None without calls."""
    allowed = sum(pairs for _, pairs in counts)
    return sum(kept for kept, _ in counts) / allowed if allowed else None


@contextlib.contextmanager
def counted(selector: Selector) -> Iterator[Densities]:
    """Count the pairs of a selector's plans while the context is open."""
    found = Densities()
    for name, into in (("plan_prefill", found.prefill), ("plan_decode", found.decode)):
        selector.__dict__[name] = _counting(getattr(selector, name), into)
    selector.__dict__["attention"] = _planned_too(selector, selector.attention)
    try:
        yield found
    finally:
        for name in ("plan_prefill", "plan_decode", "attention"):
            del selector.__dict__[name]


def _planned_too(selector: Selector, attention: Callable[..., Any]) -> Callable[..., Any]:
    """A selector's own attention, whose plan nobody asks for otherwise."""

    def attended(ctx: AttentionContext, **options: Any) -> Any:
        out = attention(ctx, **options)
        if out is not None:
            select(selector, ctx)
        return out

    return attended


def _counting(
    plan_of: Callable[[AttentionContext], Plan], into: list[tuple[float, int]]
) -> Callable[[AttentionContext], Plan]:
    def planned(ctx: AttentionContext) -> Plan:
        plan = plan_of(ctx)
        pairs = ctx.shape.pairs()
        into.append((plan.density(ctx.shape) * pairs, pairs))
        return plan

    return planned


@dataclass(frozen=True)
class Generation:
    """One prompt and a few tokens more.

    Attributes:
        prefill_seconds: of the prompt.
        decode_seconds: of one token, median.
        peak_bytes: memory that the prompt took beyond what was in use before, its KV cache
            included; None where the system does not say.
        cache_bytes: of keys and values after the prompt; None if the cache does not show them.
    """

    prefill_seconds: float
    decode_seconds: float
    peak_bytes: int | None
    cache_bytes: int | None


@torch.no_grad()
def generate_timed(
    model: nn.Module,
    prompt: Tensor,
    *,
    cache: Any = None,
    tokens: int = DECODED,
    chunk: int | None = None,
) -> Generation:
    """Run a prompt and decode greedily, with the clock running.

    Args:
        model: a transformers causal model in evaluation mode.
        prompt: (length,) token ids.
        cache: an empty KV cache; default transformers' own.
        tokens: to decode, at least 1.
        chunk: tokens of the prompt at a time; default all.
    """
    device = next(model.parameters()).device
    with peak_memory(device) as peak:
        started = _now(device)
        for feed in prompt[None].to(device).split(chunk or len(prompt), 1):
            output = model(input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
        prefill = _now(device) - started
    seconds = []
    size = cache_bytes(cache)
    for _ in range(tokens):
        feed = output.logits[:, -1:].argmax(-1)
        started = _now(device)
        output = model(input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        seconds.append(_now(device) - started)
    return Generation(prefill, statistics.median(seconds), peak(), size)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cache_bytes(cache: Any) -> int | None:
    """Bytes of the keys, values and side state in a KV cache of transformers."""
    layers = getattr(cache, "layers", None)
    if not layers:
        return None
    held = [
        tensor
        for layer in layers
        for tensor in (layer.keys, layer.values, *getattr(layer, "side", {}).values())
        if isinstance(tensor, Tensor)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


@contextlib.contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Callable[[], int | None]]:
    """Largest extra memory while the context is open, in bytes.

    On a GPU torch counts it. On Linux the kernel does (`VmHWM`, reset beforehand), for the whole
    process and in pages; memory that the C library kept from earlier is given back first, as it
    would hide new use. Elsewhere None.

    Returns:
        A function that tells the figure once the context is closed.
    """
    device = torch.device(device)
    found: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: found[0]
        found[0] = torch.cuda.max_memory_allocated(device) - before
        return
    started = _reset_peak()
    yield lambda: found[0]
    if started is not None:
        found[0] = max(0, _status("VmHWM") - started)


def _reset_peak() -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, ValueError, IndexError):
        return None


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) * 1024
