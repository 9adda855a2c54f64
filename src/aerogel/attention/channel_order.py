"""Which channels of a head matter most: an order per layer and head, and its files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.atomic import write_atomic

FORMAT = "aerogel-channels-1"
_OFFICIAL = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj")
_METRICS = ("q", "k", "qk")  # the authors' files may hold orders of further projections


@dataclass(frozen=True, eq=False)
class ChannelOrder:
    """Channels of every head, the most important first.

    Args:
        layers: per layer (heads, head_dim) int64, every row a permutation of the channels. Heads
            are query heads, or key heads whose channels all query heads of the group share.
        metric: what they are ordered by: "q", "k" or "qk".

    Raises:
        ValueError: a row is no permutation, or there is no layer.
    """

    layers: dict[int, Tensor]
    metric: str = ""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("channels: expected at least one layer")
        for layer, order in self.layers.items():
            whole = torch.arange(order.shape[-1]) if order.dim() == 2 else None
            if whole is None or not bool((order.sort(-1).values == whole).all()):
                raise ValueError(
                    f"channels: layer {layer} has shape {tuple(order.shape)}, expected (heads, "
                    "head_dim) with a permutation of the channels in every row"
                )

    def layer(self, layer: int, q_heads: int, kv_heads: int, head_dim: int) -> Tensor:
        """The order of a layer: (q_heads or kv_heads, head_dim).

        Raises:
            ValueError: the layer is missing, or is of other heads or another width.
        """
        if layer not in self.layers:
            raise ValueError(f"channels: no layer {layer}; they are of another model")
        order = self.layers[layer]
        if order.shape[0] not in (q_heads, kv_heads) or order.shape[1] != head_dim:
            raise ValueError(
                f"channels: layer {layer} has {order.shape[0]} heads of {order.shape[1]}, expected "
                f"{q_heads} or {kv_heads} of {head_dim}; they are of another model"
            )
        return order

    def shared(self, kv_heads: int) -> ChannelOrder:
        """One order per key head, by the mean rank over its query heads; equal: lowest channel.

        Raises:
            ValueError: the heads are no multiple of `kv_heads`.
        """
        united = {}
        for layer, order in self.layers.items():
            if order.shape[0] % kv_heads:
                raise ValueError(
                    f"kv_heads={kv_heads}: expected a divisor of the {order.shape[0]} heads of "
                    f"layer {layer}"
                )
            rank = torch.argsort(order, -1).unflatten(0, (kv_heads, -1)).sum(1)
            united[layer] = torch.sort(rank, dim=-1, stable=True).indices
        return ChannelOrder(united, self.metric)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {
            "format": FORMAT,
            "metric": self.metric,
            "layers": {str(layer): order.tolist() for layer, order in self.layers.items()},
        }

    @classmethod
    def from_json(cls, data: Any, metric: str = "") -> ChannelOrder:
        """Reads our JSON, or the authors': keys ``model.layers.N.self_attn.{q,k,qk}_proj``.

        Orders of their other projections (``v_proj``, ``o_proj``, ``down_proj``) are left out.

        Args:
            data: the parsed file.
            metric: which of the authors' projections; may be left out if there is only one.

        Raises:
            ValueError: it is neither, or the metric is missing or ambiguous.
        """
        if not isinstance(data, dict):
            raise ValueError(f"channels: a {type(data).__name__}, expected a JSON object")
        if data.get("format") == FORMAT:
            found = {int(layer): _order(rows) for layer, rows in data["layers"].items()}
            return cls(found, str(data["metric"]))
        kinds: dict[str, dict[int, Tensor]] = {}
        for key, rows in data.items():
            match = _OFFICIAL.fullmatch(key)
            if match is None:
                raise ValueError(f"channels: key {key!r}, expected {_OFFICIAL.pattern}")
            if match[2] in _METRICS:
                kinds.setdefault(match[2], {})[int(match[1])] = _order(rows)
        chosen = metric or (next(iter(kinds)) if len(kinds) == 1 else "")
        if chosen not in kinds:
            raise ValueError(f"metric={metric!r}: expected one of {sorted(kinds)}")
        return cls(kinds[chosen], chosen)

    def save(self, path: str | Path) -> None:
        """Writes `to_json`."""
        write_atomic(Path(path), json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: str | Path, metric: str = "") -> ChannelOrder:
        """Reads a file as `from_json` does.

        Raises:
            ValueError: it is no such file.
        """
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not a channel file ({error})") from error
        return cls.from_json(data, metric)


def _order(rows: Any) -> Tensor:
    try:
        return torch.tensor(rows, dtype=torch.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"channels: expected lists of integers ({error})") from error
