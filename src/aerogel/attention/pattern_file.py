"""Patterns of heads, and the JSON that MInference's authors ship them in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aerogel.atomic import write_atomic

KINDS = ("stream_llm", "vertical_and_slash", "block_sparse")


class HeadPattern(NamedTuple):
    """One head's shape and sizes.

    Attributes:
        kind: "stream_llm" (first tokens, window), "vertical_and_slash" (columns, diagonals), or
            "block_sparse" (blocks, unused).
        vertical: first size.
        slash: second size.
    """

    kind: str = "vertical_and_slash"
    vertical: int = 1000
    slash: int = 6096


@dataclass(frozen=True)
class PatternConfig:
    """Patterns and their scores, layer by layer; heads that are absent have the default pattern.

    Attributes:
        layers: head number to pattern, for every layer.
        scores: head number to the score of its search, for every layer; may be empty.
    """

    layers: tuple[dict[int, HeadPattern], ...]
    scores: tuple[dict[int, float], ...] = ()

    def layer(self, index: int, heads: int) -> list[HeadPattern]:
        """The pattern of every head of a layer.

        Raises:
            ValueError: there is no such layer, or a pattern for a head that the model has not.
        """
        if index >= len(self.layers):
            raise ValueError(f"config: {len(self.layers)} layers, but the model has layer {index}")
        known = self.layers[index]
        if known and max(known) >= heads:
            raise ValueError(f"config: head {max(known)} in layer {index}, but {heads} heads")
        return [known.get(head, HeadPattern()) for head in range(heads)]

    def to_json(self) -> list[dict[str, list[Any]]]:
        """As the authors write it: per layer ``{head: [type, v, s, score]}``."""
        rows = []
        for number, layer in enumerate(self.layers):
            scores = self.scores[number] if number < len(self.scores) else {}
            rows.append({str(h): [*pattern, scores.get(h, 0.0)] for h, pattern in layer.items()})
        return rows

    @classmethod
    def from_json(cls, rows: list[Any]) -> PatternConfig:
        """Reads the authors' form.

        Raises:
            ValueError: it is not of that form, or a type or size is not known.
        """
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("config: expected a list of {head: [type, v, s, score]}, one a layer")
        layers, scores = [], []
        for number, row in enumerate(rows):
            entries = {int(head): entry for head, entry in row.items()}
            for head, entry in entries.items():
                _check(number, head, entry)
            layers.append({h: HeadPattern(e[0], int(e[1]), int(e[2])) for h, e in entries.items()})
            scores.append({h: float(e[3]) for h, e in entries.items() if len(e) > 3})
        return cls(tuple(layers), tuple(scores))


def _check(layer: int, head: int, entry: Any) -> None:
    where = f"config: layer {layer}, head {head}: {entry!r}"
    if not isinstance(entry, (list, tuple)) or len(entry) < 3:
        raise ValueError(f"{where}, expected [type, v, s, score]")
    if entry[0] not in KINDS:
        raise ValueError(f"{where}, expected a type of {KINDS}")
    if min(entry[1], entry[2]) < 0:
        raise ValueError(f"{where}, expected sizes of at least 0")


def load_patterns(path: str | Path) -> PatternConfig:
    """Reads a configuration file; raises ValueError if it is none."""
    try:
        rows = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    return PatternConfig.from_json(rows)


def save_patterns(config: PatternConfig, path: str | Path) -> None:
    """Writes a configuration file."""
    write_atomic(Path(path), json.dumps(config.to_json()))
