"""Patterns: which weights are zero together, and which choices a group of weights has.

Two kinds. A *unit* pattern (`Unstructured`, `Block`, `Filter`, `Channel`, `KernelGroup`) cuts the
weight into units that live or die whole; how many live is the caller's budget. A *group* pattern
(`NM`, `NMPairs`, `TransposableNM`, `KernelPattern`) fixes the choice inside every group, and so
fixes the density.
"""

from __future__ import annotations

import re

from aerogel.sparsity.group_patterns import NM, GroupPattern, KernelPattern, NMPairs, TransposableNM
from aerogel.sparsity.pattern import Pattern, Pool
from aerogel.sparsity.select import unknown_name
from aerogel.sparsity.unit_patterns import (
    Block,
    Channel,
    Filter,
    KernelGroup,
    UnitPattern,
    Unstructured,
)

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Filter",
    "GroupPattern",
    "KernelGroup",
    "KernelPattern",
    "NMPairs",
    "Pattern",
    "Pool",
    "TransposableNM",
    "UnitPattern",
    "Unstructured",
    "parse_pattern",
]


def parse_pattern(spec: str | Pattern) -> Pattern:
    """The pattern that a string names.

    Args:
        spec: ``"unstructured"``, ``"2:4"`` (``"2:4:axis0"``, ``"2:4:pad"``, ``"2:4:transposable"``,
            ``"2:4:pairs"``), ``"4x1"`` = ``"block:4x1"`` (4 consecutive outputs by 1 input;
            ``"block:4x1:flatten"`` for convolutions), ``"filter"``, ``"channel"``,
            ``"kernel-group:4"``, ``"kernel-pattern"``; a `Pattern` is returned as it is.

    Raises:
        TypeError: neither a string nor a `Pattern`.
        ValueError: not a pattern; the message lists the nearest ones.
    """
    if isinstance(spec, Pattern):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"pattern must be a string or a Pattern, got {spec!r}")
    text = spec.strip().lower()
    if text in _NAMED:
        return _NAMED[text]
    if match := re.fullmatch(r"(?:nm:)?(\d+):(\d+)((?::(?:axis0|pad|pairs|transposable))*)", text):
        return _parse_nm(int(match[1]), int(match[2]), match[3].split(":")[1:], spec)
    if match := re.fullmatch(r"(?:block:)?(\d+)x(\d+)(:flatten)?", text):
        return Block(int(match[1]), int(match[2]), flatten=match[3] is not None)
    if match := re.fullmatch(r"kernel-(group|pattern):(\d+)", text):
        size = int(match[2])
        return KernelGroup(size) if match[1] == "group" else KernelPattern(group=size)
    known = [*_NAMED, "2:4", "1:4", "4x1", "2x1", "block:4x1", "kernel-group:4"]
    raise ValueError(f"{unknown_name('pattern', text, known)} (one of: {', '.join(known)})")


_NAMED: dict[str, Pattern] = {
    "unstructured": Unstructured(),
    "filter": Filter(),
    "channel": Channel(),
    "kernel-pattern": KernelPattern(),
}


def _parse_nm(n: int, m: int, flags: list[str], spec: str) -> Pattern:
    chosen = set(flags)
    if chosen == {"transposable"}:
        return TransposableNM(n, m)
    if "pairs" in chosen and chosen <= {"pairs", "pad"}:
        return NMPairs(n, m, pad="pad" in chosen)
    if chosen <= {"axis0", "pad"}:
        return NM(n, m, axis=0 if "axis0" in chosen else 1, pad="pad" in chosen)
    raise ValueError(f"pattern {spec!r} combines options that exclude each other: {sorted(chosen)}")
